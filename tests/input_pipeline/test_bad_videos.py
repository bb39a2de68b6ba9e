import json
import os

import av
import numpy as np
import pytest
from video_files import pictures, write_audio, write_video

from input_pipeline import check
from input_pipeline.bad_videos import BadVideoLog, TooManyBadVideos, check_source
from input_pipeline.sources import open_source


def batch(*bad, epoch=0, good=(100,)):
    indices = [*bad, *good]
    return {
        'index': np.array(indices),
        'path': np.array([f'/v/{k}.mp4' for k in indices], object),
        'epoch': np.full(len(indices), epoch),
        'error': np.array(['corrupt: bad: data'] * len(bad) + [''] * len(good), object),
    }


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_bad_record_counts_and_is_written_once(tmp_path, caplog):
    log = BadVideoLog(tmp_path / 'deep' / 'bad.jsonl', 0.5, 10)
    with caplog.at_level('WARNING', logger='absl'):
        assert log.add(batch(3, 5)) == 2
        assert log.add(batch(5, epoch=1)) == 0
    assert len(log) == 2
    assert log.counts() == {'corrupt': 2}
    assert lines(log.path)[0] == {
        'index': 3,
        'path': '/v/3.mp4',
        'kind': 'corrupt',
        'reason': 'bad: data',
        'epoch': 0,
    }
    assert len(lines(log.path)) == 2


def test_good_batches_write_nothing(tmp_path):
    log = BadVideoLog(tmp_path / 'bad.jsonl', 0.01, 10)
    assert log.add(batch()) == 0
    assert not log.path.exists()


def test_too_many_stop_with_the_list_after_writing_it(tmp_path):
    log = BadVideoLog(tmp_path / 'bad.jsonl', 0.02, 100)
    log.add(batch(1, 2))
    with pytest.raises(TooManyBadVideos, match='3 of 100 videos cannot be read, 2 are') as caught:
        log.add(batch(9))
    assert '/v/1.mp4: corrupt: bad: data' in str(caught.value)
    assert '/v/9.mp4' in str(caught.value)
    assert len(lines(log.path)) == 3


def test_padding_is_not_bad(tmp_path):
    padded = batch(good=(-1, -1))
    assert BadVideoLog(tmp_path / 'bad.jsonl', 0.0, 10).add(padded) == 0


@pytest.mark.parametrize(
    ('share', 'total', 'limit'), [(0.01, 5, 1), (0.01, 250, 2), (0.0, 250, 0), (1.0, 7, 7)]
)
def test_one_bad_video_never_stops_a_run_unless_none_is_allowed(tmp_path, share, total, limit):
    assert BadVideoLog(tmp_path / 'bad.jsonl', share, total).limit == limit


def test_share_out_of_range_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r'max_share=1\.5'):
        BadVideoLog(tmp_path / 'bad.jsonl', 1.5, 10)


def test_a_restart_remembers_and_drops_a_half_written_line(tmp_path):
    path = tmp_path / 'bad.jsonl'
    BadVideoLog(path, 0.5, 10).add(batch(1, 2))
    with open(path, 'a') as file:
        file.write('{"index": 7, "pa')
    log = BadVideoLog(path, 0.5, 10)
    assert len(log) == 2
    assert log.add(batch(2, 4, epoch=3)) == 1
    assert [entry['index'] for entry in lines(path)] == [1, 2, 4]


def test_another_file_in_the_place_of_the_report_is_an_error(tmp_path):
    path = tmp_path / 'bad.jsonl'
    path.write_text('hello\n')
    with pytest.raises(ValueError, match=r'bad\.jsonl:1: not a line of a bad video report'):
        BadVideoLog(path, 0.5, 10)


@pytest.fixture
def folder(tmp_path):
    videos = tmp_path / 'videos' / 'run'
    videos.mkdir(parents=True)
    write_video(videos / 'a.mp4', pictures(20))
    write_audio(videos / 'b.mp4')
    (videos / 'c.mp4').write_bytes(b'')
    write_video(videos / 'd.mp4', pictures(20))
    return videos.parent


def test_check_finds_what_training_would_find(folder, tmp_path):
    seen = []
    result = check_source(
        open_source(folder), tmp_path / 'bad.jsonl', progress=lambda *state: seen.append(state)
    )
    assert result.total == 4
    assert result.counts == {'no video stream': 1, 'empty': 1}
    assert [entry['index'] for entry in result.bad] == [1, 2]
    assert lines(tmp_path / 'bad.jsonl') == list(result.bad)
    assert seen == [(1, 4, 0), (2, 4, 1), (3, 4, 2), (4, 4, 2)]
    assert len(BadVideoLog(tmp_path / 'bad.jsonl', 0.5, 4)) == 2


def test_full_check_finds_damage_between_the_sampled_frames(tmp_path):
    folder = tmp_path / 'videos' / 'run'
    folder.mkdir(parents=True)
    path = write_video(folder / 'a.mp4', pictures(80), gop=4)
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0)]
    data = bytearray(path.read_bytes())
    # Frame 10 lies between the sampled frames 5 and 15 and in a GOP of its own.
    data[places[10] : places[10] + 4] = b'\xff' * 4
    path.write_bytes(data)
    source = open_source(folder.parent)
    assert not check_source(source, tmp_path / 'bad.jsonl').bad
    assert check_source(source, tmp_path / 'bad.jsonl', full=True).counts == {'corrupt': 1}


def test_check_command_reports_and_exits_with_one(folder, tmp_path, capsys):
    report = tmp_path / 'report.jsonl'
    assert check.main(['--list', str(folder), '--report', str(report)]) == 1
    output = capsys.readouterr().out
    assert '2 of 4 videos (50.00%) cannot be read' in output
    assert 'no video stream' in output
    assert len(lines(report)) == 2


def test_check_command_exits_with_zero_when_all_is_well(folder, tmp_path, capsys):
    text = f'{folder}/run/a.mp4 0\n{folder}/run/d.mp4 0\n'
    (tmp_path / 'list.txt').write_text(text)
    report = tmp_path / 'report.jsonl'
    assert check.main(['--list', f'{tmp_path}/list.txt', '--report', str(report), '--full']) == 0
    assert 'all 2 videos can be read' in capsys.readouterr().out
    assert report.read_text() == ''


def test_check_command_leaves_no_empty_report_that_was_not_asked_for(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'list.txt').write_text(f'{folder}/run/a.mp4 0\n')
    assert check.main(['--list', 'list.txt']) == 0
    assert not (tmp_path / 'bad_videos.jsonl').exists()
    (tmp_path / 'list.txt').write_text(f'{folder}/run/c.mp4 0\n')
    assert check.main(['--list', 'list.txt']) == 1
    assert len(lines(tmp_path / 'bad_videos.jsonl')) == 1


def test_check_command_exits_with_two_when_the_list_is_wrong(tmp_path, capsys):
    assert check.main(['--list', str(tmp_path / 'nothing.txt')]) == 2
    assert 'no such list' in capsys.readouterr().out


def test_check_command_finds_a_report_it_cannot_write_before_it_reads(
    folder, tmp_path, capsys, monkeypatch
):
    list_file = tmp_path / 'list.txt'
    list_file.write_text(f'{folder}/run/a.mp4 0\n')
    monkeypatch.setattr(check, 'check_source', lambda *unused, **options: pytest.fail('read'))
    for report in (list_file / 'bad.jsonl', tmp_path):
        assert check.main(['--list', str(list_file), '--report', str(report)]) == 2
        assert 'error:' in capsys.readouterr().out


def test_several_hosts_count_together_and_stop_where_they_check(tmp_path):
    logs = [BadVideoLog(tmp_path / f'bad_{i}.jsonl', 0.2, 10, alone=False) for i in (0, 1)]
    logs[0].add(batch(1, 2))
    logs[1].add(batch(3, 2))  # not both could read 2
    for log in logs:
        assert len(log) == log.limit == 2
        log.check()
    logs[0].learn(logs[1].found)
    with pytest.raises(TooManyBadVideos, match='3 of 10 videos cannot be read, 2 are') as caught:
        logs[0].check()
    assert 'those of the other hosts' in str(caught.value)
    assert '/v/3.mp4' not in str(caught.value)


def test_reports_of_other_hosts_are_known_after_a_restart(tmp_path):
    BadVideoLog(tmp_path / 'bad_0.jsonl', 0.5, 10).add(batch(1))
    BadVideoLog(tmp_path / 'bad_1.jsonl', 0.5, 10).add(batch(3, 1))
    log = BadVideoLog(
        tmp_path / 'bad.jsonl', 0.5, 10, [tmp_path / f'bad_{i}.jsonl' for i in (0, 1)]
    )
    assert len(log) == 2
    assert log.add(batch(3)) == 0 and not log.path.exists()
    assert log.add(batch(4)) == 1 and log.found == [4] and len(log) == 3


def hung(*indices, epoch=0):
    found = batch(*indices, epoch=epoch)
    found['error'][: len(indices)] = 'timed out: not read in 60 s, 2 times'
    return found


def skips(log, total=10):
    """The records that a stream skips, by epoch."""

    class Stream:
        def place(self, position):
            return position % total, position // total

    return [
        [k for k in range(total) if log.skipped.find(Stream(), epoch * total + k)]
        for epoch in range(3)
    ]


def test_records_over_which_processes_ended_are_skipped_after_a_restart(tmp_path, caplog):
    path = tmp_path / 'bad.jsonl'
    with caplog.at_level('WARNING', logger='absl'):
        log = BadVideoLog(path, 1.0, 10)
        log.add(batch(1))
        assert 'not read again' not in caplog.text
        log.add(hung(4, epoch=1))
        log.add(hung(2, epoch=2))
        log.add(hung(4, epoch=2))
    assert caplog.text.count('is not read again in this run, nor after a restart') == 1
    assert f'take its line out of {path}' in caplog.text
    assert skips(log) == [[], [], []]  # the stream itself adds to them while it runs
    caplog.clear()
    with caplog.at_level('WARNING', logger='absl'):
        again = BadVideoLog(path, 1.0, 10)
    assert caplog.text.count('is not read again') == 1
    assert skips(again) == [[], [4], [2, 4]]
    assert len(again) == 3
    other_host = BadVideoLog(tmp_path / 'bad_1.jsonl', 1.0, 10, [path])
    assert skips(other_host) == [[], [4], [2, 4]]


def test_a_bad_video_that_hangs_later_counts_once_and_is_skipped(tmp_path):
    log = BadVideoLog(tmp_path / 'bad.jsonl', 1.0, 10)
    assert log.add(batch(4)) == 1
    assert log.add(hung(4, epoch=2)) == 0
    assert len(log) == 1 and log.found == [4]
    again = BadVideoLog(log.path, 1.0, 10)
    assert skips(again) == [[], [], [4]] and len(again) == 1


@pytest.mark.parametrize('reason', ['missing: no such file', 'unreadable: ESTALE: Stale'])
def test_a_disk_that_is_gone_is_said_to_be(tmp_path, reason):
    found = batch(1, 2, 3)
    found['error'][:3] = reason
    with pytest.raises(TooManyBadVideos, match=r'3 of them .* is data\.root right, and'):
        BadVideoLog(tmp_path / 'bad.jsonl', 0.01, 10).add(found)
    with pytest.raises(TooManyBadVideos) as caught:
        BadVideoLog(tmp_path / 'other.jsonl', 0.01, 10).add(batch(1, 2, 3))
    assert 'data.root' not in str(caught.value) and 'data.max_bad_share' in str(caught.value)


def test_check_names_what_is_no_file_and_a_failing_disk(folder, tmp_path):
    os.mkfifo(folder / 'run' / 'e.mp4')
    (folder / 'run' / 'f.mp4').symlink_to('/proc/self/mem')
    (tmp_path / 'list.txt').write_text(''.join(f'{folder}/run/{name}.mp4 0\n' for name in 'aef'))
    result = check_source(open_source(tmp_path / 'list.txt'), tmp_path / 'bad.jsonl')
    assert [(entry['kind'], entry['reason']) for entry in result.bad] == [
        ('not a video', 'is a FIFO, not a regular file'),
        ('unreadable', 'EIO: Input/output error'),
    ]
