"""Tests, in folders as the code is."""

import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
