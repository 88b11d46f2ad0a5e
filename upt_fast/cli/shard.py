"""``upt-fast shard``."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from upt_fast.common.sizes import parse_bytes, show_bytes

HELP = "write a directory of images as WebDataset shards, which train, eval and predict read"


def add_options(parser: ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("data", type=str, metavar="DATA", help="directory of images, laid out as for train")
    parser.add_argument("out", type=str, metavar="OUT", help="folder of the shards, new or empty")
    parser.add_argument(
        "--shard-size", type=str | int | None, default=None, help="bytes that make a shard full; none: 512MB"
    )
    parser.add_argument("--images-per-shard", type=int | None, default=None, help="images that do, instead")
    parser.add_argument(
        "--classes-from", type=str, default="top", help="which folders are classes, as for train: top or leaf"
    )
    parser.add_argument(
        "--classnames", type=str | None, default=None, help="JSON or CSV file, class folder -> name, as for train"
    )
    parser.add_argument(
        "--on-corrupt", type=str, default="error", help="images that cannot be read: error, or skip to leave them out"
    )


def run(options: Namespace) -> int:
    """Write shards, and say what they hold."""
    if options.shard_size is not None and options.images_per_shard is not None:
        raise ValueError("shard_size and images_per_shard are both given; wanted one of them")
    size = None if options.shard_size is None else parse_bytes("shard_size", options.shard_size)
    from upt_fast.data.sharding import SHARD_BYTES, write_shards

    written = write_shards(
        options.data,
        options.out,
        shard_bytes=SHARD_BYTES if size is None else size,
        images_per_shard=options.images_per_shard,
        classes_from=options.classes_from,
        classnames=options.classnames,
        on_corrupt=options.on_corrupt,
    )
    of_splits = ", ".join(f"{count} {split}" for split, count in written.images.items())
    print(f"{options.out}: {of_splits} images in {written.shards} shards of {show_bytes(written.num_bytes)}")
    return 0
