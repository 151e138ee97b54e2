// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

import {Escrow} from "../src/Escrow.sol";
import {PayoutDistributor} from "../src/PayoutDistributor.sol";
import {WOPEN} from "../src/WOPEN.sol";
import {IEscrow} from "../src/interfaces/IEscrow.sol";
import {IPayoutDistributor} from "../src/interfaces/IPayoutDistributor.sol";
import {IWOPEN} from "../src/interfaces/IWOPEN.sol";
import {Test} from "./Vm.sol";

/// @dev A tree of two leaves, the smallest with a proof.
library Pair {
    function leaf(address account, uint256 amount) internal pure returns (bytes32) {
        return keccak256(bytes.concat(keccak256(abi.encode(account, amount))));
    }

    function root(bytes32 a, bytes32 b) internal pure returns (bytes32) {
        return a < b ? keccak256(abi.encode(a, b)) : keccak256(abi.encode(b, a));
    }

    function one(bytes32 sibling) internal pure returns (bytes32[] memory proof) {
        proof = new bytes32[](1);
        proof[0] = sibling;
    }
}

contract PayoutsTest is Test {
    uint64 private constant WINDOW = 1 days;
    address private constant ALICE = address(0xa11ce);
    address private constant BOB = address(0xb0b);
    address private constant GUARDIAN = address(0x6a);
    bytes32 private constant ACCOUNT = keccak256("an Ed25519 key");

    WOPEN private token = new WOPEN();
    PayoutDistributor private distributor =
        new PayoutDistributor(token, WINDOW, GUARDIAN, address(this));
    Escrow private escrow = new Escrow(token, address(distributor), address(this));

    receive() external payable {}

    function setUp() public {
        vm.deal(address(this), 1000 ether);
        token.deposit{value: 500 ether}();
        token.approve(address(escrow), type(uint256).max);
    }

    function _fund(uint64 period, uint256 amount) private {
        escrow.deposit(ACCOUNT, amount);
        escrow.release(period, amount);
    }

    function _activate(uint64 period, uint256 alice, uint256 bob) private {
        bytes32 root = Pair.root(Pair.leaf(ALICE, alice), Pair.leaf(BOB, bob));
        distributor.propose(period, root, alice + bob, period * 100);
        vm.warp(block.timestamp + WINDOW);
        distributor.activate(period);
    }

    function test_deposit_release_propose_activate_claim() public {
        vm.expectEmit(true, true, true, true);
        emit IEscrow.Deposited(ACCOUNT, address(this), 10, 0);
        same(escrow.deposit(ACCOUNT, 10), 0, "first id");
        vm.snapshotGasLastCall("Payouts", "deposit");
        same(escrow.deposit(ACCOUNT, 20), 1, "second id");
        escrow.release(1, 25);
        vm.snapshotGasLastCall("Payouts", "release");
        same(escrow.available(), 5, "available");
        same(token.balanceOf(address(distributor)), 25, "funded");

        bytes32 a = Pair.leaf(ALICE, 15);
        bytes32 b = Pair.leaf(BOB, 10);
        vm.expectEmit(true, true, true, true);
        emit IPayoutDistributor.Proposed(
            1, Pair.root(a, b), 25, 77, uint64(block.timestamp) + WINDOW
        );
        distributor.propose(1, Pair.root(a, b), 25, 77);
        vm.snapshotGasLastCall("Payouts", "propose");
        vm.warp(block.timestamp + WINDOW);
        distributor.activate(1);
        vm.snapshotGasLastCall("Payouts", "activate");
        same(distributor.active().logSize, 77, "log size");

        vm.expectEmit(true, true, true, true);
        emit IPayoutDistributor.Claimed(ALICE, 15, 15);
        same(distributor.claim(ALICE, 15, Pair.one(b)), 15, "paid");
        vm.snapshotGasLastCall("Payouts", "first claim");
        same(token.balanceOf(ALICE), 15, "alice holds");

        _fund(2, 10);
        _activate(2, 22, 13);
        same(distributor.claim(ALICE, 22, Pair.one(Pair.leaf(BOB, 13))), 7, "the difference");
        vm.snapshotGasLastCall("Payouts", "later claim");
        same(distributor.claim(BOB, 13, Pair.one(Pair.leaf(ALICE, 22))), 13, "both periods at once");
        same(distributor.totalClaimed(), 35, "all paid");
        same(token.balanceOf(address(distributor)), 0, "nothing left");
    }

    function test_claiming_twice_reverts() public {
        _fund(1, 25);
        _activate(1, 15, 10);
        bytes32[] memory proof = Pair.one(Pair.leaf(BOB, 10));
        distributor.claim(ALICE, 15, proof);
        vm.expectRevert(
            abi.encodeWithSelector(IPayoutDistributor.NothingToClaim.selector, ALICE, 15)
        );
        distributor.claim(ALICE, 15, proof);
    }

    function test_a_wrong_amount_or_account_has_no_proof() public {
        _fund(1, 25);
        _activate(1, 15, 10);
        bytes32[] memory proof = Pair.one(Pair.leaf(BOB, 10));
        vm.expectRevert(abi.encodeWithSelector(IPayoutDistributor.InvalidProof.selector, ALICE, 16));
        distributor.claim(ALICE, 16, proof);
        vm.expectRevert(abi.encodeWithSelector(IPayoutDistributor.InvalidProof.selector, BOB, 15));
        distributor.claim(BOB, 15, proof);
    }

    function test_the_window_is_kept() public {
        _fund(1, 25);
        distributor.propose(1, bytes32(uint256(1)), 25, 1);
        uint64 open = uint64(block.timestamp) + WINDOW;
        vm.warp(open - 1);
        vm.expectRevert(abi.encodeWithSelector(IPayoutDistributor.WindowOpen.selector, open));
        distributor.activate(1);
        vm.warp(open);
        distributor.activate(1);
    }

    function test_a_veto_drops_the_root_and_the_period_may_come_again() public {
        _fund(1, 25);
        distributor.propose(1, bytes32(uint256(1)), 25, 1);
        vm.expectRevert(abi.encodeWithSelector(IPayoutDistributor.AlreadyPending.selector, 1));
        distributor.propose(2, bytes32(uint256(1)), 25, 1);
        vm.expectRevert(
            abi.encodeWithSelector(IPayoutDistributor.NotGuardian.selector, address(this))
        );
        distributor.veto(1);
        vm.expectEmit(true, true, true, true);
        emit IPayoutDistributor.Vetoed(1, bytes32(uint256(1)));
        vm.prank(GUARDIAN);
        distributor.veto(1);
        vm.expectRevert(abi.encodeWithSelector(IPayoutDistributor.NotPending.selector, 1));
        distributor.activate(1);
        _activate(1, 15, 10);
        same(distributor.active().period, 1, "period 1 after all");
    }

    function test_nothing_runs_backwards() public {
        _fund(3, 25);
        _activate(3, 15, 10);
        bytes32 root = bytes32(uint256(1));
        vm.expectRevert(abi.encodeWithSelector(IPayoutDistributor.StalePeriod.selector, 3, 3));
        distributor.propose(3, root, 25, 300);
        vm.expectRevert(abi.encodeWithSelector(IPayoutDistributor.TotalDecreased.selector, 25, 24));
        distributor.propose(4, root, 24, 300);
        vm.expectRevert(
            abi.encodeWithSelector(IPayoutDistributor.LogSizeDecreased.selector, 300, 299)
        );
        distributor.propose(4, root, 25, 299);
        vm.expectRevert(abi.encodeWithSelector(IPayoutDistributor.Zero.selector));
        distributor.propose(4, 0, 25, 300);
    }

    function test_period_zero_is_none() public {
        vm.expectRevert(abi.encodeWithSelector(IPayoutDistributor.StalePeriod.selector, 0, 0));
        distributor.propose(0, bytes32(uint256(1)), 0, 0);
        vm.expectRevert(abi.encodeWithSelector(IPayoutDistributor.NotPending.selector, 0));
        distributor.activate(0);
    }

    function test_an_uncovered_total_is_not_activated() public {
        _fund(1, 24);
        distributor.propose(1, bytes32(uint256(1)), 25, 1);
        vm.warp(block.timestamp + WINDOW);
        vm.expectRevert(abi.encodeWithSelector(IPayoutDistributor.Underfunded.selector, 24, 25));
        distributor.activate(1);
        _fund(2, 1);
        distributor.activate(1);
    }

    function test_a_tree_that_promises_more_than_its_total_stops() public {
        _fund(1, 100);
        bytes32 a = Pair.leaf(ALICE, 15);
        bytes32 b = Pair.leaf(BOB, 10);
        distributor.propose(1, Pair.root(a, b), 20, 1);
        vm.warp(block.timestamp + WINDOW);
        distributor.activate(1);
        distributor.claim(ALICE, 15, Pair.one(b));
        vm.expectRevert(abi.encodeWithSelector(IPayoutDistributor.TotalExceeded.selector, 20, 25));
        distributor.claim(BOB, 10, Pair.one(a));
    }

    function test_who_may_do_what() public {
        vm.startPrank(address(0xbad));
        vm.expectRevert();
        distributor.propose(1, bytes32(uint256(1)), 0, 0);
        vm.expectRevert();
        distributor.setGuardian(address(0xbad));
        vm.expectRevert();
        escrow.release(1, 1);
        vm.stopPrank();
        vm.expectRevert(); // not even the owner replaces the guardian
        distributor.setGuardian(address(this));
        vm.prank(GUARDIAN);
        distributor.setGuardian(BOB);
        same(uint160(distributor.guardian()), uint160(BOB), "guardian");
    }

    function test_escrow_bounds() public {
        vm.expectRevert(abi.encodeWithSelector(IEscrow.Zero.selector));
        escrow.deposit(0, 1);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.Zero.selector));
        escrow.deposit(ACCOUNT, 0);
        escrow.deposit(ACCOUNT, 10);
        token.transfer(address(escrow), 90); // credits nobody
        vm.expectRevert(abi.encodeWithSelector(IEscrow.Insufficient.selector, 10, 11));
        escrow.release(1, 11);
        escrow.release(1, 4);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.AlreadyReleased.selector, 1));
        escrow.release(1, 1);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.Zero.selector));
        escrow.release(0, 1);
    }

    function testFuzz_paid_over_periods_is_the_cumulative_amount(uint32[6] calldata earned) public {
        uint256 total = 0;
        for (uint64 p = 1; p <= earned.length; ++p) {
            uint256 gain = uint256(earned[p - 1]) + 1;
            _fund(p, gain);
            total += gain;
            _activate(p, total, 0);
            if (gain & 1 == 1) continue; // claims some periods, skips others
            distributor.claim(ALICE, total, Pair.one(Pair.leaf(BOB, 0)));
            same(token.balanceOf(ALICE), total, "paid so far");
        }
    }

    function test_wopen_wraps_one_for_one() public {
        (bool sent,) = address(token).call{value: 3 ether}("");
        require(sent, "a plain transfer wraps");
        same(token.balanceOf(address(this)), 503 ether, "wrapped");
        uint256 before = address(this).balance;
        token.withdraw(503 ether);
        same(address(this).balance, before + 503 ether, "unwrapped");
        same(token.totalSupply(), 0, "supply");
        vm.expectRevert();
        token.withdraw(1);
    }

    function test_wopen_tells_when_the_receiver_refuses() public {
        token.transfer(address(escrow), 1); // a contract that takes no coin
        vm.prank(address(escrow));
        vm.expectRevert(
            abi.encodeWithSelector(IWOPEN.TransferFailed.selector, address(escrow), 1)
        );
        token.withdraw(1);
    }

    function test_wopen_permit() public {
        uint256 key = 0xa11ce;
        address owner = vm.addr(key);
        bytes32 typehash = keccak256(
            "Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"
        );
        bytes32 message = keccak256(abi.encode(typehash, owner, BOB, 5, 0, block.timestamp));
        bytes32 digest = keccak256(abi.encodePacked(hex"1901", token.DOMAIN_SEPARATOR(), message));
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, digest);
        token.permit(owner, BOB, 5, block.timestamp, v, r, s);
        same(token.allowance(owner, BOB), 5, "allowance");
    }
}
