"""How well does an engine convert fewer rows into time, without any reduction? Dense DeiT-S on half an image.

    python benchmarks/half_image.py [THREADS]

The same model reads 224 x 224 pixels (197 rows) and 112 x 224 (99 rows), in turn, on each engine. The share
of the multiply-accumulates' ratio that it gains is what a method that keeps half of the rows can hope for.
"""

from __future__ import annotations

import sys

import timm
import torch

from evovit.bench.exported import exported_step
from evovit.bench.row import compare
from evovit.bench.timing import timed
from evovit.macs import gmacs

SIZES = ((224, 224), (112, 224))
ROUNDS = 30


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    for batch in (1, 8):
        models = [timm.create_model("deit_small_patch16_224", img_size=size).eval() for size in SIZES]
        images = [torch.randn(batch, 3, *size) for size in SIZES]
        work = [gmacs(model, image.shape[1:]) for model, image in zip(models, images, strict=True)]
        for engine, precision in (
            ("eager", "fp32"),
            ("onnxruntime", "fp32"),
            ("openvino", "fp32"),
            ("onnxruntime", "int8"),
            ("openvino", "int8"),
        ):
            steps = []
            for model, image in zip(models, images, strict=True):
                if engine == "eager":

                    def step(i: int, model: torch.nn.Module = model, image: torch.Tensor = image) -> object:
                        with torch.inference_mode():
                            return model(image)
                else:
                    step = exported_step(engine, model, precision, [image])
                steps.append(step)
            times: list[list[float]] = [[], []]
            for turn in range(ROUNDS):
                for i in (0, 1) if turn % 2 else (1, 0):
                    times[i].append(timed(steps[i], turn, max(1, 4 // batch), False))
            ratio = compare(*times)
            allowed = work[0] / work[1]
            print(
                f"batch {batch} {engine} {precision}: {ratio.value:.2f}x ± {ratio.noise:.1%} "
                f"of {allowed:.2f}x, conversion {ratio.value / allowed:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
