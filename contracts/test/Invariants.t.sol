// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

import {Escrow} from "../src/Escrow.sol";
import {PayoutDistributor} from "../src/PayoutDistributor.sol";
import {WOPEN} from "../src/WOPEN.sol";
import {Pair} from "./Payouts.t.sol";
import {Test} from "./Vm.sol";

/// @dev Everything that may happen to the money, in any order and with any amounts, honest trees
/// and dishonest ones. Calls that revert change nothing and are fine.
contract Hands is Test {
    WOPEN public token = new WOPEN();
    PayoutDistributor public distributor =
        new PayoutDistributor(token, 10, address(this), address(this));
    Escrow public escrow = new Escrow(token, address(distributor), address(this));

    address[2] public accounts = [address(0xa11ce), address(0xb0b)];
    uint256[2] public promised;
    uint256[2] public highest;
    uint256 public deposited;
    uint256 public releasedSum;
    uint256 public claims;

    receive() external payable {}

    function wrap(uint64 amount) external {
        vm.deal(address(this), amount);
        token.deposit{value: amount}();
        token.approve(address(escrow), type(uint256).max);
    }

    function unwrap(uint64 amount) external {
        token.withdraw(amount);
    }

    function deposit(bytes32 account, uint64 amount) external {
        escrow.deposit(account, amount % (token.balanceOf(address(this)) + 1));
        deposited = escrow.available() + releasedSum;
    }

    function stray(uint64 amount) external {
        token.transfer(address(escrow), amount % (token.balanceOf(address(this)) + 1));
    }

    function release(uint64 period, uint64 amount) external {
        uint256 wanted = amount % (escrow.available() + 1);
        escrow.release(period, wanted);
        releasedSum += wanted;
    }

    /// @dev `lie` lowers the total below the sum of the leaves.
    function propose(uint16 a, uint16 b, uint8 lie) external {
        uint256 toA = highest[0] + a;
        uint256 toB = highest[1] + b;
        bytes32 root = Pair.root(Pair.leaf(accounts[0], toA), Pair.leaf(accounts[1], toB));
        uint256 total = toA + toB;
        total -= lie % 3 == 0 ? 1 + total / 7 : 0;
        distributor.propose(distributor.active().period + 1, root, total, 0);
        promised = [toA, toB];
    }

    function veto() external {
        distributor.veto(distributor.pending().period);
    }

    function activate() external {
        vm.warp(block.timestamp + 10);
        distributor.activate(distributor.pending().period);
        highest = promised;
    }

    function claim(uint8 who) external {
        uint256 i = who % 2;
        bytes32 sibling = Pair.leaf(accounts[1 - i], highest[1 - i]);
        distributor.claim(accounts[i], highest[i], Pair.one(sibling));
        ++claims;
    }
}

contract InvariantsTest is Test {
    Hands private hands = new Hands();

    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(hands);
    }

    /// @dev The hands can reach the far end; otherwise the invariants would hold of nothing.
    function test_the_hands_reach_a_claim() public {
        hands.wrap(1000);
        hands.deposit(bytes32(uint256(1)), 900);
        hands.release(1, 800);
        hands.propose(300, 400, 1);
        hands.activate();
        hands.claim(0);
        same(hands.claims(), 1, "claims");
        same(hands.distributor().totalClaimed(), 300, "paid");
    }

    function invariant_every_token_is_backed_by_a_coin() public view {
        WOPEN token = hands.token();
        same(address(token).balance, token.totalSupply(), "supply");
    }

    function invariant_the_escrow_holds_what_it_says() public view {
        uint256 held = hands.token().balanceOf(address(hands.escrow()));
        require(held >= hands.escrow().available(), "less than available");
        same(hands.deposited(), hands.escrow().available() + hands.releasedSum(), "deposits");
    }

    function invariant_claims_are_paid_from_releases_and_never_exceed_the_total() public view {
        PayoutDistributor distributor = hands.distributor();
        uint256 paid = distributor.totalClaimed();
        require(paid <= distributor.active().total, "over the total");
        uint256 held = hands.token().balanceOf(address(distributor));
        same(held + paid, hands.releasedSum(), "released = held + paid");
        require(held + paid >= distributor.active().total, "an active root is not covered");
    }

    function invariant_paid_is_what_accounts_hold() public view {
        uint256 sum = 0;
        for (uint256 i = 0; i < 2; ++i) {
            address account = hands.accounts(i);
            uint256 paid = hands.distributor().claimed(account);
            same(paid, hands.token().balanceOf(account), "claimed = held");
            sum += paid;
        }
        same(sum, hands.distributor().totalClaimed(), "sum of claims");
    }
}
