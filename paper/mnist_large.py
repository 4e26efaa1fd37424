"""The headline flow of MNIST networks 784-10-10 on a zoo of four times as many runs."""

from dataclasses import replace

from experiment import FlowSettings, main
from mnist import HEADLINE, ZOO

import symflow


def rows() -> dict[str, FlowSettings]:
    """Return every flow by its row's name."""
    return {
        "Geometric, headline": HEADLINE,
        "Geometric, headline, path noise 0.05": replace(HEADLINE, bridge=0.05),
    }


if __name__ == "__main__":
    main("mnist-large", symflow.zoo.mnist, replace(ZOO, runs=16_384), rows(), __doc__ or "")
