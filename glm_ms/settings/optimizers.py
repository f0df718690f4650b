"""Names of optimizers and learning-rate schedules, and where their classes are: `module:Class`.

To add one, write its class and add a line here. A key of `lr_schedule` that only some schedules take names them in its
declaration, see `used_with` in `glm_ms.settings.schema`.
"""

from __future__ import annotations

# Called with params, learning_rate, and the keys of the section `optimizer`; trains float32 parameters.
OPTIMIZERS = {"GLMAdamW": "glm_ms.engine.step.adamw:GLMAdamW"}

# Called with learning_rate, warmup_steps, total_steps, and the keys that are declared for it.
SCHEDULES = {
    "LinearWithWarmUpLR": "mindformers.core.lr:LinearWithWarmUpLR",
    "CosineWithWarmUpLR": "mindformers.core.lr:CosineWithWarmUpLR",
    "ConstantWarmUpLR": "mindformers.core.lr:ConstantWarmUpLR",
    "PolynomialWithWarmUpLR": "mindformers.core.lr:PolynomialWithWarmUpLR",
}
