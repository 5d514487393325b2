import pytest
import served


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / served.NAME
    path.mkdir()
    served.write(path)
    return path


@pytest.fixture(scope="session")
def running(directory):
    started = served.Running(directory)
    yield started
    started.close()
