"""The page's files: whole, and in need of nothing from elsewhere."""

import re

from megatrain.service.console.assets import PAGE, assets

LOCAL = re.compile(r"""(?:src|href)="([^"#]+)"|from "\./([^"]+)\"""")


def texts() -> dict[str, str]:
    return {name: asset.data.decode() for name, asset in assets().items()}


def test_everything_that_is_referred_to_is_there_and_used() -> None:
    used = {PAGE}
    for name, text in texts().items():
        for in_page, in_module in LOCAL.findall(text):
            path = in_module or in_page.removeprefix("console/assets/")
            assert path in assets(), f"{name} refers to {path}"
            used.add(path)
    assert used == set(assets())


def test_nothing_is_inline_and_nothing_is_elsewhere() -> None:
    for name, text in texts().items():
        plain = text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|\"//|@import", plain), name
        assert not (name.endswith(".css") and "url(" in plain), name
        assert not re.search(r"""\bstyle=|\bon[a-z]+=["']|innerHTML|eval\(""", plain), name
    page = texts()[PAGE]
    assert re.findall(r"<script(?![^>]*src=)", page) == []
    assert "<style" not in page


def test_every_module_says_what_it_is_for() -> None:
    for name, text in texts().items():
        if name.endswith(".js"):
            assert text.startswith("// "), name
            assert len(text.splitlines()) <= 300, name
