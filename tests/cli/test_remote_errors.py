"""What users read when a store refuses, is not there or cannot do it: the URL, the reason and what to do."""

from __future__ import annotations

import http.server
import threading

import pytest
import s3fs

from kdcache.storage import retry
from tests.cache.http_store import serving
from tests.object_store import environment

COMMANDS = {
    "inspect": ["URL"],
    "verify": ["URL", "--quiet"],
    "peek": ["URL"],
    "pull": ["URL", "LOCAL", "--quiet"],
    "push": ["CACHE", "URL", "--quiet"],
    "transcode": ["CACHE", "URL", "--top-k", "2", "--quiet"],
    "train-student": ["--cache", "URL", "--student-size", "nano", "--output", "LOCAL", "--device", "cpu", "--quiet"],
    "evaluate": ["--cache", "URL", "--student", "TEACHER", "--device", "cpu", "--quiet"],
}


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers 403 to every request."""

    protocol_version = "HTTP/1.1"

    def refuse(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b"<?xml version='1.0'?><Error><Code>InvalidAccessKeyId</Code><Message>no</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = refuse

    def log_message(self, *arguments):
        pass


@pytest.fixture
def commands(run, dumped, teacher_dir, tmp_path, monkeypatch):
    """Run every command with a URL, and yield its name and its one message."""
    monkeypatch.setattr(retry, "PAUSES_S", (0.001,) * 4)

    def run_all(url, names=tuple(COMMANDS)):
        found = {"URL": url, "LOCAL": tmp_path / "local", "CACHE": dumped, "TEACHER": teacher_dir}
        for name in names:
            yield name, run(name, *(found.get(argument, argument) for argument in COMMANDS[name])).message()

    return run_all


@pytest.fixture
def refusing(monkeypatch):
    """An S3 server that refuses everything."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name, value in environment(f"http://127.0.0.1:{server.server_port}").items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    server.shutdown()
    thread.join()
    server.server_close()
    s3fs.S3FileSystem.clear_instance_cache()


def test_access_denied(commands, refusing):
    for command, message in commands("s3://bucket/cache"):
        assert message.startswith("cannot read s3://bucket/cache"), command
        assert "access denied (Forbidden); check the credentials" in message, command


def test_a_bucket_that_is_not_there(commands, object_store):
    for command, message in commands("s3://no-such-bucket/cache"):
        assert message.startswith("cannot read s3://no-such-bucket/cache"), command
        assert "the bucket does not exist; check its name" in message, command
    for command, message in commands(f"{object_store}/nothing", ["inspect", "pull", "train-student"]):
        assert f"there is no cache in {object_store}/nothing" in message, command


def test_a_server_that_is_not_there(commands, monkeypatch):
    for name, value in environment("http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    for command, message in commands("s3://bucket/cache", ["inspect"]):
        assert message.startswith("cannot reach s3://bucket/cache: Could not connect to the endpoint URL"), command
        assert message.endswith("(in 5 attempts); check the address and the network, and run the same command again")
    s3fs.S3FileSystem.clear_instance_cache()


def test_no_credentials(commands, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    for command, message in commands("s3://bucket/cache", ["inspect", "push"]):
        assert "access denied (Unable to locate credentials); check the credentials" in message, command
    s3fs.S3FileSystem.clear_instance_cache()


def test_an_http_server_that_refuses_or_only_reads(commands, dumped):
    with serving(dumped) as server:
        server.fault = lambda path, number, data: (403, b"no")
        for command, message in commands(server.url, ["inspect", "pull", "train-student"]):
            assert message.startswith(f"cannot read {server.url}/manifest.json: access denied (403"), command
        server.fault = lambda path, number, data: None
        for command, message in commands(f"{server.url}/other", ["push", "transcode"]):
            assert message.startswith(f"cannot write {server.url}/other/"), command
            assert "a store that is only read, such as http, is no target" in message, command
