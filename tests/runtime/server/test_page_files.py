"""The files of the chat page and their headers, without a browser."""

import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from fastapi import FastAPI  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from subspec.runtime.server.chat_page import FOLDER, PATHS, page_router  # noqa: E402


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.include_router(page_router())
    return TestClient(app)


def test_every_file_comes_under_the_strict_policy(client: TestClient) -> None:
    assert {"/", "/page/app.js", "/page/style.css"} <= PATHS
    for path in PATHS:
        response = client.get(path)
        assert response.status_code == 200, path
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert client.head(path).headers["etag"] == response.headers["etag"]
        again = client.get(path, headers={"If-None-Match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_other_paths_and_methods_are_refused(client: TestClient) -> None:
    for path in ("/page/", "/page/index.html", "/page/../page.py", "/page/%2e%2e/page.py"):
        assert client.get(path).status_code == 404, path
    assert client.post("/").status_code == 405


def test_the_files_name_no_other_address_and_make_no_html() -> None:
    for file in FOLDER.iterdir():
        text = file.read_text("utf-8")
        addresses = set(re.findall(r"https?://[\w.]+", text))
        assert addresses <= {"http://www.w3.org"}, file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        if file.suffix == ".html":
            assert not re.search(r"<script>|style=|\son\w+=", text)


def test_every_import_and_every_id_of_the_scripts_exists() -> None:
    html = (FOLDER / "index.html").read_text("utf-8")
    ids = set(re.findall(r'id="([\w-]+)"', html))
    for file in Path(FOLDER).glob("*.js"):
        text = file.read_text("utf-8")
        assert all((FOLDER / name).exists() for name in re.findall(r'from "\./([\w.]+)"', text))
        assert set(re.findall(r'(?:byId|getElementById)\("([\w-]+)"\)', text)) <= ids, file.name
        icons = re.findall(r'(?:icon|iconButton)\("([\w-]+)"', text)
        assert {f"icon-{name}" for name in icons} <= ids, file.name
