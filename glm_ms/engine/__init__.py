"""The MindFormers plug-in: training, evaluation and prediction from settings.

The only package that imports mindformers. Importing it registers our classes there.
"""

from __future__ import annotations

from glm_ms.engine import process as quiet

quiet.before_import()

from glm_ms.mindformers_api.registration import register  # noqa: E402

quiet.after_import()
register()
