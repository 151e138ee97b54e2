"""What a CheckpointAnchor contract holds, for monitors: the chain room behind the port that
`ledger.log.monitor_others` asks. Reads only; no account, no ledger of ours."""

from ledger.chain.client import ChainClient
from ledger.chain.l1proof import capture_l1
from ledger.domain.ids import check_address
from ledger.errors import ChainError, ConfigError, InvalidEvent, VerificationError
from ledger.log.monitor_others import AnchoredTree, AnchorReader
from ledger.verify.l1 import verify_l1


def anchor_reader(rpc_url: str, contract: str) -> AnchorReader:
    """Reads (size, root) in the node's newest block, with the proof of it where the node gives one
    (`eth_getProof`). ConfigError when `contract` is no address."""
    address = contract.lower()
    try:
        check_address(address, "contract")
    except InvalidEvent as error:
        raise ConfigError(f"{contract!r} is no contract address: 0x and 40 hex digits") from error
    client = ChainClient(rpc_url)
    functions = client.contract("CheckpointAnchor", contract).functions

    def read() -> AnchoredTree:
        block = client.head()
        size = int(client.call(functions.size(), block))
        root = bytes(client.call(functions.root(), block))
        section = None
        if size:
            try:
                section = capture_l1(
                    client, contract, size=size, root=root, block_number=block, verify=verify_l1
                )
            except (ChainError, VerificationError):
                section = None  # the pair itself is still worth comparing
        return AnchoredTree(
            chain_id=client.chain_id, contract=address, size=size, root=root, section=section
        )

    return read
