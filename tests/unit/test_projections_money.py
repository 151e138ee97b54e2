"""Each money event, one by one: what moves, what the statement says, what is refused."""

import pytest

from projections.payouts import cumulative_lines
from tests.projections_world import HEX, OPERATOR, Folding, World, actor, address

ANN, BEN, DEV, EVE = actor(10), actor(11), actor(12), actor(13)
CONSUMER = EVE


@pytest.fixture
def world() -> World:
    world = World()
    world.open()
    return world


@pytest.fixture
def folding(world: World) -> Folding:
    return Folding(world)


def earn(world: World, shares: dict[str, int], fee_wei: int = 1_000) -> str:
    """A paid, attributed answer; half of its fee goes to contributors."""
    adapter, run = world.new_id(), world.new_id()
    world.deposit(CONSUMER, fee_wei)
    inference = world.infer(CONSUMER, adapter, fee_wei)
    world.charge(CONSUMER, adapter, inference, DEV, fee_wei)
    world.attribute(adapter, run, inference, shares, 1_000_000 - sum(shares.values()))
    return inference


def settle(world: World, period: int) -> None:
    world.cutoff(period)
    world.close(period)
    world.propose(period)


def test_a_deposit_comes_from_the_world(world: World, folding: Folding) -> None:
    index = world.deposit(ANN, 500)
    assert folding.balance(ANN, "prepaid") == 500
    assert folding.balance("world", "main") == -500
    (line,) = [line for _, line in folding.rows.scan("statement_lines", (ANN,))]
    assert line["part"] == "deposit"
    assert line["tx_hash"].startswith("0x")
    assert (line["amount_wei"], line["balance_wei"]) == (500, 500)
    assert next(key for key, _ in folding.rows.scan("statement_lines", (ANN,)))[1] == index


def test_a_chain_event_counts_once(world: World, folding: Folding) -> None:
    chain = world.on_chain(log_index=True)
    for _ in range(2):
        world.add("deposit.recorded", OPERATOR, account=ANN, amount_wei="500", **chain)
    assert folding.balance(ANN, "prepaid") == 500
    assert folding.codes() == ["repeated_chain_event"]


def test_a_fee_is_split_and_its_pool_waits(world: World, folding: Folding) -> None:
    world.deposit(CONSUMER, 1_500)
    adapter = world.new_id()
    inference = world.infer(CONSUMER, adapter, 1_000)
    index = world.charge(CONSUMER, adapter, inference, DEV, 1_000)
    assert folding.balance(CONSUMER, "prepaid") == 500
    assert folding.balance("protocol", "main") == 50
    assert folding.balance(DEV, "accrued") == 250
    assert folding.balance(OPERATOR, "accrued") == 200
    assert folding.balance("pool", "main") == 500
    assert folding.rows.get("pools", (inference,)) == {
        "amount_wei": 500, "fee_index": index, "attribution_index": None, "waiting": None,
    }  # fmt: skip
    usage = folding.rows.get("adapter_usage", (adapter,))
    assert usage is not None
    assert usage["fees_wei"] == 1_000


def test_owner_and_operator_may_be_one(world: World, folding: Folding) -> None:
    world.deposit(CONSUMER, 1_000)
    inference = world.infer(CONSUMER, world.new_id(), 1_000)
    world.charge(CONSUMER, world.new_id(), inference, OPERATOR, 1_000)
    assert folding.balance(OPERATOR, "accrued") == 450
    parts = {row["part"]: row for _, row in folding.rows.scan("statement_lines", (OPERATOR,))}
    assert {part: row["amount_wei"] for part, row in parts.items()} == {
        "owner": 250, "operator": 200,
    }  # fmt: skip


def test_a_contributor_can_check_the_line(world: World, folding: Folding) -> None:
    inference = earn(world, {ANN: 600_000, BEN: 300_000})
    assert folding.balance(ANN, "accrued") == 300
    assert folding.balance(BEN, "accrued") == 150
    assert folding.balance("unattributed", "main") == 50
    assert folding.balance("pool", "main") == 0
    (line,) = [row for _, row in folding.rows.scan("statement_lines", (ANN,))]
    assert line["inference"] == inference
    assert (line["ppm"], line["pool_wei"], line["amount_wei"]) == (600_000, 500, 300)
    assert line["pool_wei"] * line["ppm"] // 1_000_000 == line["amount_wei"]


def test_attribution_before_its_fee_waits_for_it(world: World, folding: Folding) -> None:
    adapter, run = world.new_id(), world.new_id()
    world.deposit(CONSUMER, 1_000)
    inference = world.infer(CONSUMER, adapter, 1_000)
    world.attribute(adapter, run, inference, {ANN: 1_000_000}, 0)
    assert folding.balance(ANN, "accrued") == 0
    index = world.charge(CONSUMER, adapter, inference, DEV, 1_000)
    assert folding.balance(ANN, "accrued") == 500
    assert folding.balance("pool", "main") == 0
    lines = [key for key, _ in folding.rows.scan("statement_lines", (ANN,))]
    assert [key[1] for key in lines] == [index]


def test_a_free_answer_moves_nothing(world: World, folding: Folding) -> None:
    adapter, run = world.new_id(), world.new_id()
    inference = world.infer(CONSUMER, adapter, 0)
    world.attribute(adapter, run, inference, {ANN: 1_000_000}, 0)
    world.charge(CONSUMER, adapter, inference, DEV, 0)
    folding.catch_up()
    assert list(folding.rows.scan("statement_lines")) == []
    assert folding.codes() == []


def test_nothing_is_charged_beyond_the_prepaid_balance(world: World, folding: Folding) -> None:
    world.deposit(CONSUMER, 999)
    adapter = world.new_id()
    inference = world.infer(CONSUMER, adapter, 1_000)
    world.charge(CONSUMER, adapter, inference, DEV, 1_000)
    world.attribute(adapter, world.new_id(), inference, {ANN: 1_000_000}, 0)
    assert folding.codes() == ["overdrawn"]
    assert folding.balance(CONSUMER, "prepaid") == 999
    assert folding.balance(ANN, "accrued") == folding.balance(DEV, "accrued") == 0


def test_charged_and_attributed_once(world: World, folding: Folding) -> None:
    adapter, run = world.new_id(), world.new_id()
    world.deposit(CONSUMER, 2_000)
    inference = world.infer(CONSUMER, adapter, 1_000)
    for _ in range(2):
        world.charge(CONSUMER, adapter, inference, DEV, 1_000)
    world.attribute(adapter, run, inference, {ANN: 1_000_000}, 0)
    world.attribute(adapter, run, inference, {BEN: 1_000_000}, 0)
    assert folding.balance(CONSUMER, "prepaid") == 1_000
    assert folding.balance(ANN, "accrued") == 500
    assert folding.balance(BEN, "accrued") == 0
    assert folding.codes() == ["charged_twice", "attributed_twice"]
    shares = [key for key, _ in folding.rows.scan("shares", (inference,))]
    assert shares == [(inference, ANN)]


def test_a_cutoff_holds_what_is_payable(world: World, folding: Folding) -> None:
    earn(world, {ANN: 600_000, BEN: 400_000})
    world.bind(ANN, address(1))
    index = world.cutoff(1)
    assert folding.balance(ANN, "held") == 300
    assert folding.balance(ANN, "accrued") == 0
    assert folding.balance(BEN, "accrued") == 200  # no address, keeps accruing
    assert cumulative_lines(folding.rows, 1) == [(address(1).lower(), 300)]
    period = folding.rows.get("periods", (1,))
    assert period is not None
    assert (period["status"], period["cutoff_index"]) == ("cutoff", index)


def test_the_tree_is_cumulative_over_all_accounts(world: World, folding: Folding) -> None:
    world.bind(ANN, address(1))
    world.bind(BEN, address(2))
    earn(world, {ANN: 1_000_000})
    settle(world, 1)
    world.activate(1)
    earn(world, {BEN: 1_000_000})
    world.cutoff(2)
    folding.catch_up()
    lines = dict(folding.rows.scan("payout_lines", (2,)))
    assert lines[2, address(1).lower(), ANN] == {"amount_wei": 0, "cumulative_wei": 500}
    assert lines[2, address(2).lower(), BEN] == {"amount_wei": 500, "cumulative_wei": 500}
    assert cumulative_lines(folding.rows, 1) == [(address(1).lower(), 500)]


def test_held_available_paid(world: World, folding: Folding) -> None:
    world.bind(ANN, address(1))
    earn(world, {ANN: 1_000_000})
    settle(world, 1)
    world.activate(1)
    assert folding.balance(ANN, "available") == 500
    world.claim(address(1), 300)
    world.claim(address(1).lower(), 200, 500)
    assert folding.balance(ANN, "available") == 0
    assert folding.balance(ANN, "paid") == 500
    payee = folding.rows.get("payees", (address(1).lower(), ANN))
    assert payee == {"cumulative_wei": 500, "available_wei": 0, "paid_wei": 500}
    assert folding.codes() == []


def test_a_veto_gives_back(world: World, folding: Folding) -> None:
    world.bind(ANN, address(1))
    earn(world, {ANN: 1_000_000})
    settle(world, 1)
    world.veto(1)
    assert folding.balance(ANN, "accrued") == 500
    assert folding.balance(ANN, "held") == 0
    earn(world, {ANN: 1_000_000})
    settle(world, 2)
    world.activate(2)
    assert folding.balance(ANN, "available") == 1_000
    assert cumulative_lines(folding.rows, 2) == [(address(1).lower(), 1_000)]
    assert folding.codes() == []


def test_a_root_also_proves_earlier_periods(world: World, folding: Folding) -> None:
    world.bind(ANN, address(1))
    for period in (1, 2):
        earn(world, {ANN: 1_000_000})
        settle(world, period)
    world.activate(2)
    assert folding.balance(ANN, "available") == 1_000
    assert folding.balance(ANN, "held") == 0
    status = {key[0]: row["status"] for key, row in folding.rows.scan("periods")}
    assert status == {1: "superseded", 2: "activated"}
    world.activate(1)
    assert folding.balance(ANN, "available") == 1_000


def test_a_claim_before_its_activation_is_applied_later(world: World, folding: Folding) -> None:
    world.bind(ANN, address(1))
    earn(world, {ANN: 1_000_000})
    settle(world, 1)
    claimed = world.claim(address(1), 500)
    assert folding.balance(ANN, "paid") == 0
    activated = world.activate(1)
    assert folding.balance(ANN, "paid") == 500
    claim = folding.rows.get("claims", (address(1).lower(), claimed))
    assert claim is not None
    assert claim["applied_index"] == activated


def test_a_claim_that_nothing_covers_moves_nothing(world: World, folding: Folding) -> None:
    claimed = world.claim(address(9), 5)
    claim = folding.catch_up().get("claims", (address(9).lower(), claimed))
    assert claim is not None
    assert claim["applied_index"] is None
    assert list(folding.rows.scan("balances")) == []


@pytest.mark.parametrize("step", ["close", "propose", "activate", "veto"])
def test_period_steps_out_of_order_are_anomalies(world: World, folding: Folding, step: str) -> None:
    getattr(world, step)(7)
    assert folding.catch_up().get("periods", (7,)) is None
    assert folding.codes() == ["period_out_of_order"]


def test_a_period_is_settled_once(world: World, folding: Folding) -> None:
    world.bind(ANN, address(1))
    earn(world, {ANN: 1_000_000})
    settle(world, 1)
    world.cutoff(1)
    world.activate(1)
    world.activate(1)
    world.veto(1)
    assert folding.balance(ANN, "available") == 500
    assert folding.codes() == [
        "repeated_period", "period_out_of_order", "period_out_of_order",
    ]  # fmt: skip


def test_another_root_releases_nothing(world: World, folding: Folding) -> None:
    world.bind(ANN, address(1))
    earn(world, {ANN: 1_000_000})
    settle(world, 1)
    world.activate(1, root="0x" + "99" * 32)
    assert folding.balance(ANN, "held") == 500
    assert folding.codes() == ["root_mismatch"]
    world.activate(1, root=HEX)
    assert folding.balance(ANN, "available") == 500


def test_a_veto_below_a_later_period_is_shown(world: World, folding: Folding) -> None:
    world.bind(ANN, address(1))
    earn(world, {ANN: 1_000_000})
    settle(world, 1)
    earn(world, {ANN: 1_000_000})
    settle(world, 2)
    world.veto(1)
    assert folding.codes() == ["veto_out_of_order"]
    world.veto(2)
    assert folding.balance(ANN, "accrued") == 1_000
    payee = folding.rows.get("payees", (address(1).lower(), ANN))
    assert payee is not None
    assert payee["cumulative_wei"] == 0


def test_an_address_belongs_to_the_first_that_binds_it(world: World, folding: Folding) -> None:
    world.bind(ANN, address(1))
    world.bind(BEN, address(1).lower())
    folding.catch_up()
    assert folding.rows.get("addresses", (address(1).lower(),)) == {"actor": ANN, "index": 3}
    assert folding.codes() == ["address_taken"]
    identity = folding.rows.get("identities", (BEN,))
    assert identity is not None
    assert identity["evm_address"] is None


def test_what_was_held_for_an_old_address_stays_claimable_there(
    world: World, folding: Folding
) -> None:
    world.bind(ANN, address(1))
    earn(world, {ANN: 1_000_000})
    settle(world, 1)
    world.activate(1)
    world.bind(ANN, address(2))
    world.bind(BEN, address(1))
    earn(world, {ANN: 500_000, BEN: 500_000})
    settle(world, 2)
    world.activate(2)
    folding.catch_up()
    assert cumulative_lines(folding.rows, 2) == [
        (address(1).lower(), 750), (address(2).lower(), 250),
    ]  # fmt: skip
    world.claim(address(1), 750)
    assert folding.balance(ANN, "paid") == 500
    assert folding.balance(BEN, "paid") == 250
    assert folding.balance(ANN, "available") == 250


# --- holds ------------------------------------------------------------------------------------


class Held:
    """Two datanets, a contribution of ANN in each, and a run on both."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.nets = [world.datanet(DEV), world.datanet(DEV)]
        self.given = [world.contribute(ANN, net) for net in self.nets]
        self.run = world.request_run(DEV, *self.nets)

    def earn(self, shares: dict[str, int], run: str = "") -> str:
        adapter = self.world.new_id()
        self.world.deposit(CONSUMER, 1_000)
        inference = self.world.infer(CONSUMER, adapter, 1_000)
        self.world.charge(CONSUMER, adapter, inference, DEV, 1_000)
        left = 1_000_000 - sum(shares.values())
        self.world.attribute(adapter, run or self.run, inference, shares, left)
        return inference

    def hold(self, n: int) -> int:
        return self.world.hold(DEV, self.nets[n], self.given[n])

    def release(self, n: int) -> int:
        return self.world.release(DEV, self.nets[n], self.given[n])


def test_a_hold_withholds_and_its_end_pays(world: World, folding: Folding) -> None:
    held = Held(world)
    held.hold(0)
    inference = held.earn({ANN: 600_000, BEN: 400_000})
    assert (folding.balance(ANN, "withheld"), folding.balance(ANN, "accrued")) == (300, 0)
    assert folding.balance(BEN, "accrued") == 200, "nobody else's money waits"
    assert folding.balance("pool", "main") == 0
    (line,) = [row for _, row in folding.rows.scan("statement_lines", (ANN,))]
    assert (line["bucket"], line["part"], line["inference"]) == (
        "withheld", "contributor", inference,
    )  # fmt: skip
    index = held.release(0)
    assert (folding.balance(ANN, "withheld"), folding.balance(ANN, "accrued")) == (0, 300)
    moved = [
        (key[1], row["part"], row["bucket"], row["amount_wei"])
        for key, row in folding.rows.scan("statement_lines", (ANN,))
    ][1:]
    assert moved == [(index, "released", "withheld", -300), (index, "released", "accrued", 300)]
    assert list(folding.rows.scan("withheld")) == list(folding.rows.scan("held_in")) == []
    assert folding.codes() == []


def test_what_was_earned_before_a_hold_stays(world: World, folding: Folding) -> None:
    held = Held(world)
    held.earn({ANN: 1_000_000})
    held.hold(0)
    assert folding.balance(ANN, "accrued") == 500
    world.bind(ANN, address(1))
    held.earn({ANN: 1_000_000})
    world.cutoff(1)
    assert (folding.balance(ANN, "held"), folding.balance(ANN, "withheld")) == (500, 500)


def test_a_run_waits_for_the_last_hold_in_its_datanets(world: World, folding: Folding) -> None:
    held = Held(world)
    other = world.request_run(DEV, held.nets[1])
    held.hold(0)
    held.hold(1)
    held.earn({ANN: 1_000_000})
    held.earn({ANN: 1_000_000}, other)
    held.release(0)
    assert folding.balance(ANN, "accrued") == 0
    held.earn({ANN: 1_000_000})
    held.release(1)
    assert folding.balance(ANN, "accrued") == 1_500
    held.hold(0)
    held.earn({ANN: 1_000_000}, other)
    assert folding.balance(ANN, "accrued") == 2_000, "a run without that datanet pays on"


def test_shares_that_waited_for_their_fee_are_withheld_by_its_index(
    world: World, folding: Folding
) -> None:
    held = Held(world)
    adapter = world.new_id()
    world.deposit(CONSUMER, 1_000)
    inference = world.infer(CONSUMER, adapter, 1_000)
    world.attribute(adapter, held.run, inference, {ANN: 1_000_000}, 0)
    held.hold(0)
    world.charge(CONSUMER, adapter, inference, DEV, 1_000)
    assert (folding.balance(ANN, "withheld"), folding.balance(ANN, "accrued")) == (500, 0)


def test_holds_out_of_order_move_nothing(world: World, folding: Folding) -> None:
    held = Held(world)
    held.release(0)
    held.hold(0)
    held.earn({ANN: 1_000_000})
    held.hold(0)
    world.hold(DEV, held.nets[0], world.new_id())
    held.release(0)
    held.release(0)
    assert folding.balance(ANN, "accrued") == 500
    assert folding.codes() == ["hold_out_of_order"] * 4
