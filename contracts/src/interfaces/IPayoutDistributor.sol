// SPDX-License-Identifier: Apache-2.0
pragma solidity >=0.8.24;

/// @title PayoutDistributor: cumulative Merkle payouts with a challenge window
/// @notice One tree holds, for every account, what it has earned since the beginning. A claim pays
/// that figure less what the account was paid before, so a new root replaces the old one without
/// losing an unclaimed unit, and claiming twice pays once.
///
/// The tree is OpenZeppelin's StandardMerkleTree over ["address", "uint256"]: the leaf is
/// keccak256(bytes.concat(keccak256(abi.encode(account, cumulativeAmount)))), pairs are sorted.
///
/// Life of a root: the owner proposes it; for `challengeWindow` seconds anyone recomputes it from
/// the log (size `logSize`) and the guardian may veto; then anyone activates it.
///
/// @dev Warning: the contract cannot see whether a tree is right, only that period and size grow,
/// that the total does not fall, that the total is covered, and that claims never exceed it. The
/// window and the guardian are what stands between a wrong tree and the money.
/// @dev Warning: within a right total a wrong tree can pay the wrong accounts. A leaf lower than
/// the account's last one takes nothing back; it pays nothing until it grows again.
interface IPayoutDistributor {
    /// @notice A root with what it commits to. Amounts are cumulative, in base units.
    struct Payout {
        bytes32 root;
        uint256 total;
        uint64 period;
        uint64 logSize;
        uint64 activatableAt;
    }

    event Proposed(
        uint64 indexed period, bytes32 root, uint256 total, uint64 logSize, uint64 activatableAt
    );
    event Activated(uint64 indexed period, bytes32 root, uint256 total, uint64 logSize);
    event Vetoed(uint64 indexed period, bytes32 root);
    /// @notice `amount` was paid now; `cumulativeAmount` is all that `account` was ever paid.
    event Claimed(address indexed account, uint256 amount, uint256 cumulativeAmount);
    event GuardianSet(address indexed guardian);

    /// @notice A root, an account or an address that must not be zero is.
    error Zero();
    /// @notice Only the guardian may do this.
    error NotGuardian(address caller);
    /// @notice `period` waits already: it is activated or vetoed first.
    error AlreadyPending(uint64 period);
    /// @notice No root of that period waits.
    error NotPending(uint64 period);
    /// @notice Periods strictly increase; `active` is in force.
    error StalePeriod(uint64 active, uint64 proposed);
    /// @notice A cumulative total never falls.
    error TotalDecreased(uint256 active, uint256 proposed);
    /// @notice A later period is computed from a log at least as long.
    error LogSizeDecreased(uint64 active, uint64 proposed);
    /// @notice The challenge window is open until `activatableAt` (seconds).
    error WindowOpen(uint64 activatableAt);
    /// @notice What was paid and what is here do not cover the total: release the escrow first.
    error Underfunded(uint256 covered, uint256 total);
    /// @notice (account, cumulativeAmount) is not in the active tree.
    error InvalidProof(address account, uint256 cumulativeAmount);
    /// @notice The account was paid `claimed` in all, and the leaf promises no more.
    error NothingToClaim(address account, uint256 claimed);
    /// @notice The tree promises more than its total: it is wrong, and pays no further.
    error TotalExceeded(uint256 total, uint256 wouldBePaid);

    /// @notice Seconds between proposal and activation. Immutable.
    /// @dev Warning: 0 is allowed, for a development chain, and leaves no time to veto.
    function challengeWindow() external view returns (uint64);

    /// @notice May veto, and names its own successor; the owner cannot replace it.
    function guardian() external view returns (address);

    /// @notice The root that claims are paid from; all zero before the first activation.
    function active() external view returns (Payout memory);

    /// @notice The root that waits; all zero when none does.
    function pending() external view returns (Payout memory);

    /// @notice What an account was paid in all, in base units.
    function claimed(address account) external view returns (uint256);

    /// @notice What all accounts were paid in all, in base units.
    function totalClaimed() external view returns (uint256);

    /// @notice Owner only: propose the root of `period` over cumulative amounts summing to `total`,
    /// folded from the log's first `logSize` entries.
    function propose(uint64 period, bytes32 root, uint256 total, uint64 logSize) external;

    /// @notice Guardian only: drop the root that waits, also when its window has passed. The
    /// period may be proposed again.
    function veto(uint64 period) external;

    /// @notice Anyone, after the window: put the root of `period` in force.
    function activate(uint64 period) external;

    /// @notice Anyone, for anyone: pay `account` what the active tree owes it.
    /// @dev Warning: the money goes to `account`, whoever calls.
    /// @return amount paid now, in base units, never 0
    function claim(address account, uint256 cumulativeAmount, bytes32[] calldata proof)
        external
        returns (uint256 amount);

    /// @notice Guardian only: hand the guardian's part over.
    function setGuardian(address newGuardian) external;
}
