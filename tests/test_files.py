import pytest

from eigenattn import EigenAttnError
from eigenattn.files import whole


def test_a_file_appears_when_it_is_written(tmp_path):
    target = tmp_path / "report.html"
    target.write_text("before")
    with whole(target) as beside:
        beside.write_text("after")
        assert target.read_text() == "before"
    assert target.read_text() == "after"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_fails_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "report.html"
    target.write_text("before")
    with pytest.raises(error), whole(target) as beside:
        beside.write_text("half")
        raise error
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_what_cannot_be_written_is_one_line(tmp_path):
    with (
        pytest.raises(EigenAttnError, match="report could not be written: No space") as caught,
        whole(tmp_path / "report"),
    ):
        raise OSError(28, "No space left on device")
    assert "\n" not in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(EigenAttnError, match="Not a directory"), whole(tmp_path / "file" / "report") as beside:
        beside.write_text("nowhere")
