"""Keeps the logs of MindSpore and MindFormers out of the terminal; errors still come through.

Set GLM_MS_VERBOSE=1 to see everything.
"""

from __future__ import annotations

import logging
import os
import sys

VERBOSE = os.environ.get("GLM_MS_VERBOSE", "0") != "0"


def before_import() -> None:
    """To be called before mindspore and mindformers are imported: both read their settings then."""
    if not VERBOSE:
        os.environ.setdefault("GLOG_v", "3")  # MindSpore: errors only
        logging.disable(logging.WARNING)  # MindFormers warns of models whose parts are not installed


def after_import() -> None:
    """Leaves MindFormers its log file and takes the terminal from it.

    Its loggers are made anew when a Trainer sets another output folder, so this is called again then.
    """
    if VERBOSE:
        return
    logging.disable(logging.NOTSET)
    for handler in sys.modules["mindformers.tools.logger"].get_logger().handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
    # The trainer prints its whole configuration with a function of its module; no method can be overridden.
    sys.modules["mindformers.trainer.base_trainer"].pprint = lambda _: None
