from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

from kvstore.errors import UnsupportedEngine


@pytest.mark.skipif(importlib.util.find_spec("lmcache") is not None, reason="LMCache is installed here")
def test_without_lmcache_the_adapter_says_what_to_install() -> None:
    with pytest.raises(UnsupportedEngine, match=r"pip install 'lmcache>=0\.5\.6,<0\.5\.7'"):
        importlib.import_module("kvstore_client.integrations.lmcache")
    assert "kvstore_client.integrations.lmcache" not in sys.modules
