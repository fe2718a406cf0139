"What several test modules share."

import browser
import pytest


@pytest.fixture(scope="session")
def chromium():
    "One headless Chromium for all tests that open pages; they are skipped, with the reason, where there is none."
    with browser.chromium() as opened:
        yield opened
