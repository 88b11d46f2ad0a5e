"""Tables from saved benchmarks: ``python bench/report.py FILE.json`` prints Markdown."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path


def report(saved: dict) -> str:
    """Median times and their ratios to ``fast``, per group, and peak memory."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for item in saved["benchmarks"]:
        groups[item["group"]].append(item)
    info = saved["machine_info"]
    lines = [
        f"{info['cpu'].get('brand_raw', info['processor'])}, {info['threads']} threads, torch {info['torch']}, "
        f"{saved['datetime'][:10]}, commit {saved['commit_info']['id'][:8]}",
        "",
        "| group | provider | median | times fast |",
        "|---|---|---:|---:|",
    ]
    for group, items in groups.items():
        memory = "activations_mib" in items[0]["extra_info"]
        values = {}
        for item in items:
            extra = item["extra_info"]
            value = extra["activations_mib"] if memory else item["stats"]["median"] / extra.get("share_of_classes", 1)
            values[extra["provider"]] = value
        for provider, value in values.items():
            shown = f"{value:.0f} MiB" if memory else f"{value:.3f} s"
            ratio = f"{value / values['fast']:.2f}" if "fast" in values else ""
            lines.append(f"| {group.split(' (')[0]} | {provider} | {shown} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
