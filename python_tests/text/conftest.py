import kimi_files
import pytest

from k2kernels.text.tokenizer import load_tokenizer


@pytest.fixture
def kimi(tmp_path):
    """The directory of a tokenizer in the form of Kimi-K2's, and the id of its first token of turns."""
    return tmp_path, kimi_files.write(tmp_path)


@pytest.fixture
def tokenizer(kimi):
    return load_tokenizer(kimi[0])
