"""Money: balances, statements line by line, prepaying, claiming on chain."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ledger.cli.context import As, Json, actor, client, key_path, listing, out, show
from ledger.config import Settings, load_settings
from ledger.domain.money import WEI_PER_OPEN, format_open, parse_open

app = typer.Typer(name="account", no_args_is_help=True, help="Balances, statements, claims.")

DEVELOPMENT_COINS_WEI = 1_000 * WEI_PER_OPEN
LINE = ["index", "type", "bucket", "amount_wei", "balance_wei", "ppm", "pool_wei", "inference"]
Who = Annotated[str, typer.Argument(help="Key name or actor id.")]


@app.command()
def balance(who: Who = "me", as_json: Json = False) -> None:
    """Balances by bucket: prepaid, accrued, held, available, paid."""
    with client() as ledger:
        found = ledger.get(f"/v1/accounts/{actor(who)}/balances")
    if as_json:
        show(found, as_json=True)
        return
    for bucket, wei in found.items():
        out.print(f"{bucket:<10} {format_open(int(wei))}")


@app.command()
def statement(
    who: Who = "me",
    limit: Annotated[int, typer.Option(help="At most so many lines.")] = 50,
    as_json: Json = False,
) -> None:
    """Every posting: which event, which inference, your share, of which pool."""
    lines = []
    with client() as ledger:
        for line in ledger.pages(f"/v1/accounts/{actor(who)}/statement"):
            lines.append(line)
            if len(lines) >= limit:
                break
    listing(lines, LINE, as_json=as_json)


@app.command()
def deposit(
    amount: Annotated[str, typer.Argument(help="OPEN, such as 2.5.")], who: As = "me"
) -> None:
    """Prepay: send OPEN from your EVM address to the escrow, for your ledger account."""
    from ledger import bootstrap

    settings = load_settings()
    key_file = key_path(who).with_name(f"{who}-evm.key")
    wallet = bootstrap.wallet_of(key_file)
    with client(who) as ledger:
        payouts = _payouts(settings, key_file, ledger.get("/v1/info"))
        out.print(f"paying from {wallet.address}")
        receipt = payouts.deposit(ledger.actor, parse_open(amount))
        out.print(f"deposited {amount} OPEN in transaction 0x{receipt.tx_hash.hex()}")


def _payouts(settings: Settings, key_file: Path, info: dict[str, Any]) -> Any:
    """The contracts for a wallet; on a development chain the wallet gets coins first."""
    from ledger import bootstrap

    bootstrap.fund(bootstrap.chain_of(settings, info), key_file, DEVELOPMENT_COINS_WEI)
    return bootstrap.payouts(settings, key_file, info)


@app.command()
def claim(who: As = "me") -> None:
    """Claim what the active payout root owes the EVM address bound to your key."""

    settings = load_settings()
    key_file = key_path(who).with_name(f"{who}-evm.key")
    with client(who) as ledger:
        identity = ledger.get(f"/v1/identities/{ledger.actor}")
        active = [p for p in ledger.pages("/v1/periods") if p["status"] == "activated"]
        if not active or not identity["evm_address"]:
            out.print("nothing to claim: no period is active, or no EVM address is bound")
            return
        number, address = active[0]["period"], identity["evm_address"]
        line = ledger.get(f"/v1/periods/{number}/claims/{address}")
        payouts = _payouts(settings, key_file, ledger.get("/v1/info"))
        proof = [bytes.fromhex(node[2:]) for node in line["proof"]]
        receipt = payouts.claim(address, int(line["cumulative_wei"]), proof)
        if receipt is None:
            out.print("everything owed was paid already")
        else:
            out.print(f"claimed in transaction 0x{receipt.tx_hash.hex()}")
        out.print(f"paid in all: {format_open(payouts.claimed(address))}")
