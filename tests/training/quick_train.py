"""train_textual_inversion.py with one product for a UNet: it compiles fast, for tests that start many processes."""

import runpy
from pathlib import Path

from mindspore import ops

from gm import engine


class QuickModel(engine.Model):
    def construct(self, x, timesteps, context, y):
        return x * ops.mean(context) + ops.mean(y)


if __name__ == "__main__":
    from tests.training import quick_train  # by its name: the script takes the place of __main__

    engine.Model = quick_train.QuickModel
    runpy.run_path(str(Path(__file__).parents[2] / "train_textual_inversion.py"), run_name="__main__")
