"""Activation sparsity on SmolLM2-135M: calibrate, plan, generate with a dense prompt.

    python examples/sparsity.py [--target 0.4]

Takes a minute or two on a CPU and needs no accelerator.
"""

from __future__ import annotations

import argparse

import lutjax
from lutjax.calibrate import activation_quantiles
from lutjax.cli.models import evaluation_text
from lutjax.evaluate import windows
from lutjax.io import demo_model_path
from lutjax.models import generate
from lutjax.sparsity import PhasedParams, measure_sparsity, phased, plan_uniform, sparsify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=float, default=0.4)
    parser.add_argument("--prompt", default="The capital of France is")
    args = parser.parse_args()

    model, params, tokenizer = lutjax.load(demo_model_path())
    ids = tokenizer.encode(evaluation_text(), add_special_tokens=False)
    *calibration, held_out = [row[None] for row in windows(ids, 256, 5)]

    # A function of parameters and a batch is all that calibration needs to know of a model.
    def logits(params, tokens):
        return model.apply({"params": params}, tokens)

    quantiles = activation_quantiles(logits, params, calibration, progress=True)
    plan = plan_uniform(params, quantiles, args.target)
    print(str(plan).splitlines()[0])

    # The gated parameters share every weight with the plain ones.
    gated = sparsify(params, plan)
    achieved = measure_sparsity(logits, gated, [held_out])
    print(f"on other text: {100 * achieved.overall:.1f} %")

    both = PhasedParams(prefill=params, decode=gated)
    apply_fn = phased(lutjax.lift(model.apply))
    prompt = tokenizer.encode(args.prompt)
    for name, fn, tree in (("dense", model.apply, params), ("sparse", apply_fn, both)):
        (tokens,) = generate(fn, tree, [prompt], config=model.config, max_new_tokens=24)
        print(f"{name:<6} {args.prompt}{tokenizer.decode(tokens)}")


if __name__ == "__main__":
    main()
