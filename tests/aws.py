"""What moto lacks of AWS."""

from typing import Any

import pytest

from clusters import aws_setup

AN_IMAGE = "ami-12c6146b"  # one that moto has


def name_an_image(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter that names an image; moto has none of AWS's own, and nobody may make those."""
    monkeypatch.setattr(aws_setup, "IMAGE", "/image")
    parameter = {"Name": "/image", "Value": AN_IMAGE, "Type": "String", "Overwrite": True}
    session.client("ssm").put_parameter(**parameter)
