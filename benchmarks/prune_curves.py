"""Accuracy against zeros and against multiply-adds of four networks of the zoo, beside onnxsim: rows and picture.

    python -m benchmarks.prune_curves -o CURVES.svg [--zoo ZOO [--minilm MODEL.onnx] [--peer PYTHON] [NETWORK ...]]

Without `--zoo` it draws the rows that `benchmarks/prune_rows` holds.  With it, it first runs those that are missing
there (all of them: about an hour and a half of one core; delete the line of a row that is to be run again), as
`benchmarks.prune` does, on samples and tests of `benchmarks.prune_data`, which it makes in `--data` and which
need `tokenizers` and Pillow.  MiniLM is too large for the zoo: `--minilm` says where `make_minilm.py` put it, without
which it is left out.  PYTHON has onnxsim.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.prune import Trial, complete
from benchmarks.prune_data import NETWORKS, parted
from benchmarks.prune_picture import picture

ROWS = Path(__file__).with_name("prune_rows")
AMOUNTS = ("0.5", "0.8", "0.9", "0.95", "2:4", "channels:0.3", "channels:0.5", "channels:0.7")
MINILM = "text_minilm_l6_ts14"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing, writes the picture; returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--data", type=Path, default=Path(".prune_data"))
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    given = parser.parse_intermixed_args(argv)
    for name in given.networks if given.zoo else ():
        model = given.minilm if name == MINILM else given.zoo / "models" / f"{name}.onnx"
        if model is None:
            sys.stdout.write(f"{name}: left out, because --minilm does not say where it is\n")
            continue
        samples, test = parted(given.zoo, name, given.data)
        sys.stdout.write(f"{name}\n")
        complete(Trial(model, samples, test, ROWS / f"{name}.json", peer=given.peer), AMOUNTS)
    found = [path for name in NETWORKS if (path := ROWS / f"{name}.json").exists()]
    known = [(NETWORKS[path.stem].title, json.loads(path.read_text("utf-8"))) for path in found]
    given.output.write_text(picture(known), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
