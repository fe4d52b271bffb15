"""Finetune SmolLM2-135M on Python's help topics: 3-bit base plus low-rank parts (LQ-LoRA).

    python examples/finetune_smollm2.py

Every eighth topic is held out. Interrupt it and start it again: it goes on where it was. The
default of 30 steps takes some minutes on two cores; 100 steps and more learn more.
"""

from __future__ import annotations

import os

# LAPACK's threads wait for each other on thin matrices (docs/lq_lora.md).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

from lutjax.io import demo_model_path
from train.finetune import FinetuneConfig, finetune


def write_topics(path: Path, names: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in names))
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("smollm2-help"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--method", default="lq-lora", choices=["lora", "qlora", "loftq", "lq-lora"]
    )
    parser.add_argument("--bits", type=int, default=3)
    arguments = parser.parse_args()

    arguments.output.mkdir(exist_ok=True)
    names = sorted(topics)
    held_out = names[::8]
    result = finetune(
        FinetuneConfig(
            model=str(demo_model_path()),
            data=write_topics(
                arguments.output / "train.jsonl", [n for n in names if n not in held_out]
            ),
            eval_data=write_topics(arguments.output / "held_out.jsonl", held_out),
            output=arguments.output,
            method=arguments.method,
            bits=arguments.bits,
            rank=32,
            rounds=5,
            sequence_length=256,
            batch_size=2,
            steps=arguments.steps,
            learning_rate=5e-4,
            checkpoint_every=10,
        )
    )
    for step, found in sorted(result.evaluations.items()):
        print(f"step {step}: held-out perplexity {found['eval_perplexity']:.3f}")


if __name__ == "__main__":
    main()
