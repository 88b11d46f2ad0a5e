"""Tables from saved benchmarks: ``python bench/report.py FILE.json`` prints Markdown."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path


def report(saved: dict) -> str:
    """Median times, their ratios to ``fast`` and their share of the best product, per group, and peak memory."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for item in saved["benchmarks"]:
        groups[item["group"]].append(item)
    info = saved["machine_info"]
    lines = [
        f"{info['cpu'].get('brand_raw', info['processor'])}, {info['threads']} threads, torch {info['torch']}, "
        f"{saved['datetime'][:10]}, commit {saved['commit_info']['id'][:8]}",
        "",
        "| group | provider | median | times fast | of the best plain product |",
        "|---|---|---:|---:|---:|",
    ]
    for group, items in groups.items():
        memory = "activations_mib" in items[0]["extra_info"]
        values, shares = {}, {}
        for item in items:
            extra = item["extra_info"]
            value = extra["activations_mib"] if memory else item["stats"]["median"] / extra.get("share_of_classes", 1)
            values[extra["provider"]] = value
            shares[extra["provider"]] = f"{extra['share_of_gemm_peak']:.0%}" if "share_of_gemm_peak" in extra else ""
        for provider, value in values.items():
            shown = f"{value:.0f} MiB" if memory else f"{value:.3f} s"
            ratio = f"{value / values['fast']:.2f}" if "fast" in values else ""
            lines.append(f"| {group.split(' (')[0]} | {provider} | {shown} | {ratio} | {shares[provider]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
