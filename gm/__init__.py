"""Textual inversion for SDXL on MindSpore."""

import os

os.environ.setdefault("GLOG_v", "3")  # MindSpore, once imported, warns of every CPU fallback otherwise
