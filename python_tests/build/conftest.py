import pytest
import sass

from k2kernels import _C


@pytest.fixture(scope="session")
def listings():
    """{(arch, symbol): SASS} of every kernel of the package."""
    return sass.dump(_C.__file__)
