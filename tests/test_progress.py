from jvdit.machine import progress


def test_a_log_has_a_line_when_something_begins_ends_or_has_taken_long(
    monkeypatch, capsys
):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Bars() as bars:
        task = bars.add_task("encoding", total=100)
        for _ in range(99):
            now[0] += 1.0
            bars.advance(task, 1)
        bars.update(task, description="writing")
        bars.advance(task, 1)
    lines = capsys.readouterr().err.split("\n")[:-1]
    wanted = ["encoding 0/100", "encoding 30/100", "encoding 60/100", "encoding 90/100"]
    assert lines == [*wanted, "writing 99/100", "writing 100/100"]
    with progress.Bars(show=False) as bars:
        bars.add_task("compiling", total=None)
    assert capsys.readouterr().err == ""
