// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

import {Ownable, Ownable2Step} from "@openzeppelin/contracts/access/Ownable2Step.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuard} from "@openzeppelin/contracts/utils/ReentrancyGuard.sol";

import {IEscrow} from "./interfaces/IEscrow.sol";

/// @title See IEscrow, which documents it
contract Escrow is Ownable2Step, ReentrancyGuard, IEscrow {
    using SafeERC20 for IERC20;

    IERC20 public immutable token;
    address public immutable distributor;

    uint256 public deposits;
    uint256 public available;
    mapping(uint64 period => uint256 amount) public released;

    constructor(IERC20 token_, address distributor_, address owner_) Ownable(owner_) {
        if (address(token_) == address(0) || distributor_ == address(0)) revert Zero();
        token = token_;
        distributor = distributor_;
    }

    // Guarded because the credit is a difference of balances around a call to the token.
    function deposit(bytes32 account, uint256 amount)
        external
        nonReentrant
        returns (uint256 depositId)
    {
        if (account == 0) revert Zero();
        uint256 before = token.balanceOf(address(this));
        token.safeTransferFrom(msg.sender, address(this), amount);
        uint256 received = token.balanceOf(address(this)) - before;
        if (received == 0) revert Zero();

        depositId = deposits++;
        available += received;
        emit Deposited(account, msg.sender, received, depositId);
    }

    function release(uint64 period, uint256 amount) external onlyOwner nonReentrant {
        if (period == 0 || amount == 0) revert Zero();
        if (released[period] != 0) revert AlreadyReleased(period);
        if (amount > available) revert Insufficient(available, amount);

        released[period] = amount;
        available -= amount;
        emit Released(period, amount);
        token.safeTransfer(distributor, amount);
    }
}
