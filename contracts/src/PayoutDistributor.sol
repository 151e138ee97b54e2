// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

import {Ownable, Ownable2Step} from "@openzeppelin/contracts/access/Ownable2Step.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";

import {IPayoutDistributor} from "./interfaces/IPayoutDistributor.sol";

/// @title See IPayoutDistributor, which documents it
contract PayoutDistributor is Ownable2Step, IPayoutDistributor {
    using SafeERC20 for IERC20;

    IERC20 public immutable token;
    uint64 public immutable challengeWindow;

    address public guardian;
    uint256 public totalClaimed;
    mapping(address account => uint256 amount) public claimed;
    Payout private _active;
    Payout private _pending;

    modifier onlyGuardian() {
        if (msg.sender != guardian) revert NotGuardian(msg.sender);
        _;
    }

    constructor(IERC20 token_, uint64 challengeWindow_, address guardian_, address owner_)
        Ownable(owner_)
    {
        if (address(token_) == address(0)) revert Zero();
        token = token_;
        challengeWindow = challengeWindow_;
        _setGuardian(guardian_);
    }

    function propose(uint64 period, bytes32 root, uint256 total, uint64 logSize)
        external
        onlyOwner
    {
        if (root == 0) revert Zero();
        if (_pending.period != 0) revert AlreadyPending(_pending.period);
        // Also refuses period 0, which means "none" in storage.
        if (period <= _active.period) revert StalePeriod(_active.period, period);
        if (total < _active.total) revert TotalDecreased(_active.total, total);
        if (logSize < _active.logSize) revert LogSizeDecreased(_active.logSize, logSize);

        uint64 activatableAt = uint64(block.timestamp) + challengeWindow;
        _pending = Payout(root, total, period, logSize, activatableAt);
        emit Proposed(period, root, total, logSize, activatableAt);
    }

    function veto(uint64 period) external onlyGuardian {
        Payout memory dropped = _takePending(period);
        emit Vetoed(period, dropped.root);
    }

    function activate(uint64 period) external {
        Payout memory next = _takePending(period);
        if (block.timestamp < next.activatableAt) revert WindowOpen(next.activatableAt);
        uint256 covered = totalClaimed + token.balanceOf(address(this));
        if (covered < next.total) revert Underfunded(covered, next.total);

        _active = next;
        emit Activated(period, next.root, next.total, next.logSize);
    }

    function claim(address account, uint256 cumulativeAmount, bytes32[] calldata proof)
        external
        returns (uint256 amount)
    {
        bytes32 leaf = keccak256(bytes.concat(keccak256(abi.encode(account, cumulativeAmount))));
        if (!MerkleProof.verifyCalldata(proof, _active.root, leaf)) {
            revert InvalidProof(account, cumulativeAmount);
        }
        uint256 before = claimed[account];
        if (cumulativeAmount <= before) revert NothingToClaim(account, before);
        amount = cumulativeAmount - before;
        uint256 paid = totalClaimed + amount;
        if (paid > _active.total) revert TotalExceeded(_active.total, paid);

        claimed[account] = cumulativeAmount;
        totalClaimed = paid;
        emit Claimed(account, amount, cumulativeAmount);
        token.safeTransfer(account, amount);
    }

    function setGuardian(address newGuardian) external onlyGuardian {
        _setGuardian(newGuardian);
    }

    function active() external view returns (Payout memory) {
        return _active;
    }

    function pending() external view returns (Payout memory) {
        return _pending;
    }

    function _takePending(uint64 period) private returns (Payout memory taken) {
        taken = _pending;
        if (period == 0 || taken.period != period) revert NotPending(period);
        delete _pending;
    }

    function _setGuardian(address newGuardian) private {
        if (newGuardian == address(0)) revert Zero();
        guardian = newGuardian;
        emit GuardianSet(newGuardian);
    }
}
