"""Hours from a provider: asked of a real server on this machine, in the words of the providers' own documentation."""

import json
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from perjoule.core.errors import BadInput
from perjoule.devices import live
from perjoule.devices.grid import hourly

NOON = datetime(2026, 3, 20, 12, tzinfo=UTC)


class Server:
    """Answers each path from `answers`: (status, body); remembers what was asked."""

    def __init__(self):
        asked, answers = [], {}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append((self.path, self.headers.get("auth-token")))
                status, body = answers.get(self.path.partition("?")[0], (404, b"no"))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

            def log_message(self, *args):
                pass

        self.asked, self.answers = asked, answers
        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def half(at, forecast, actual=None):
    stamps = {"from": f"{at:%Y-%m-%dT%H:%MZ}", "to": f"{at + timedelta(minutes=30):%Y-%m-%dT%H:%MZ}"}
    return stamps | {"intensity": {"forecast": forecast, "actual": actual, "index": "low"}}


def britain(server, rows, start=NOON, hours=3):
    end = start + timedelta(hours=hours)
    server.answers[f"/intensity/{start:%Y-%m-%dT%H:%MZ}/{end:%Y-%m-%dT%H:%MZ}"] = (200, {"data": rows})
    return live.fetch(live.GreatBritain(server.base), "", start, end)


HALVES = [
    half(NOON - timedelta(minutes=30), 90, 95),  # the provider begins one before what was asked
    half(NOON, 100, 110), half(NOON + timedelta(minutes=30), 100, 130),
    half(NOON + timedelta(hours=1), 80, 70), half(NOON + timedelta(hours=1, minutes=30), 60),
    half(NOON + timedelta(hours=2), 50),
]  # fmt: skip


def test_half_hours_make_hours_and_measured_ones_are_told_from_foreseen(server):
    found = britain(server, HALVES)
    assert [(h.at.hour, h.g_per_kwh, h.kind) for h in found] == [(12, 120.0, "actual"), (13, 65.0, "forecast")]


def test_a_long_stretch_is_asked_in_pieces(server):
    with pytest.raises(BadInput, match="404"):
        live.fetch(live.GreatBritain(server.base), "", NOON, NOON + timedelta(days=30))
    first = server.asked[0][0]
    assert first == "/intensity/2026-03-20T12:00Z/2026-04-02T12:00Z"


def maps(server, monkeypatch, token="mine"):
    monkeypatch.setenv("ELECTRICITYMAPS_TOKEN", token)
    return live.ElectricityMaps(server.base)


def row(at, grams):
    return {"zone": "DE", "carbonIntensity": grams, "datetime": f"{at:%Y-%m-%dT%H:%M:%S.000Z}", "isEstimated": False}


def test_history_and_forecast_with_a_token(server, monkeypatch):
    hour = timedelta(hours=1)
    server.answers["/v3/carbon-intensity/history"] = (200, {"zone": "DE", "history": [row(NOON, 322)]})
    ahead = {"zone": "DE", "forecast": [row(NOON, 300), row(NOON + hour, 280)]}
    server.answers["/v3/carbon-intensity/forecast"] = (200, ahead)
    found = live.fetch(maps(server, monkeypatch), "DE", NOON, NOON + 5 * hour)
    assert [(h.g_per_kwh, h.kind) for h in found] == [(322, "actual"), (280, "forecast")]
    assert server.asked == [(f"/v3/carbon-intensity/{p}?zone=DE", "mine") for p in ("history", "forecast")]


def test_a_plan_without_forecasts_still_has_its_history(server, monkeypatch):
    server.answers["/v3/carbon-intensity/history"] = (200, {"history": [row(NOON, 322)]})
    server.answers["/v3/carbon-intensity/forecast"] = (403, b"")
    assert len(live.fetch(maps(server, monkeypatch), "DE", NOON, NOON + timedelta(hours=5))) == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, b""), "the token is refused"),
        ((500, b""), "answers 500"),
        ((200, b"<html>"), "not JSON"),
        ((200, {"error": "gone"}), "not what it used to be"),
        ((200, {"history": [{"datetime": "soon", "carbonIntensity": 1}]}), "not what it used to be"),
        ((200, {"history": []}), "has no hours"),
        ((200, {"history": [row(NOON, 322_000)]}), "cannot be"),
        ((200, b" " * (live.LARGEST_BYTES + 1)), "sends more than"),
    ],
)
def test_a_bad_answer_is_one_line(server, monkeypatch, answer, said):
    server.answers["/v3/carbon-intensity/history"] = answer
    with pytest.raises(BadInput, match=said) as error:
        live.fetch(maps(server, monkeypatch), "DE", NOON, NOON + timedelta(hours=5))
    assert "\n" not in str(error.value)


def test_without_token_zone_or_network(server, monkeypatch):
    with pytest.raises(BadInput, match="ELECTRICITYMAPS_TOKEN"):
        live.fetch(maps(server, monkeypatch, token=""), "DE", NOON, NOON + timedelta(hours=1))
    with pytest.raises(BadInput, match="--zone DE"):
        live.fetch(maps(server, monkeypatch), "", NOON, NOON + timedelta(hours=1))
    with pytest.raises(BadInput, match="Great Britain only"):
        live.fetch(live.GreatBritain(server.base), "DE", NOON, NOON + timedelta(hours=1))
    with pytest.raises(BadInput, match="cannot be reached"):
        live.fetch(live.GreatBritain("http://127.0.0.1:9"), "", NOON, NOON + timedelta(hours=1))
    assert not server.asked


def test_the_file_keeps_what_was_measured_and_replaces_what_was_foreseen(tmp_path):
    path = tmp_path / "new" / "hours.csv"
    hour = timedelta(hours=1)

    def made(first, grams, kind):
        return [live.Fetched(at=NOON + i * hour, g_per_kwh=g, kind=kind) for i, g in enumerate(grams, first)]

    assert live.last(path) is None
    assert live.merged(path, made(0, [100, 90], "actual") + made(2, [80], "forecast")) == (3, 3)
    assert live.last(path) == NOON + 2 * hour
    assert live.merged(path, made(1, [1], "forecast") + made(2, [70, 60], "actual")) == (1, 4)
    assert [round(1000 * h.kg_per_kwh) for h in hourly(path)] == [100, 90, 70, 60]
    assert live.last(path) == NOON + 4 * hour
    before = path.read_bytes()
    with pytest.raises(BadInput, match=r"no hours from 2026-03-20 15:00 to 2026-03-20 18:00"):
        live.merged(path, made(6, [5], "actual"))
    assert path.read_bytes() == before


def test_a_file_of_somebody_else_is_left_alone(tmp_path):
    path = tmp_path / "hours.csv"
    path.write_text("hour,price\n1,2\n")
    with pytest.raises(BadInput, match="was not written by ledger fetch"):
        live.merged(path, [live.Fetched(at=NOON, g_per_kwh=1.0, kind="actual")])
    assert path.read_text() == "hour,price\n1,2\n"
