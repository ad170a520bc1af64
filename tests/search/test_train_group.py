"""The interface that gloo is told to use."""

from sft_ray.search.train_group import AddressedBackend, AddressedTorch, interface_of


def test_an_address_has_its_interface() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.1") is None
    assert AddressedTorch(backend="gloo").backend_cls is AddressedBackend
