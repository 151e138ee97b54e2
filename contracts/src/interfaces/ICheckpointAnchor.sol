// SPDX-License-Identifier: Apache-2.0
pragma solidity >=0.8.24;

/// @title CheckpointAnchor: the newest checkpoint of one log, which can only grow
/// @notice Keeps (size, root) of one transparency log and accepts a new pair only with the proof
/// that the log was extended, never rewritten. One contract per log.
///
/// What a stored pair means: the committer sent it, its tree extends the tree of every pair
/// stored before it (RFC 9162 section 2.1.4.2), and its last entry carries the index size - 1.
///
/// Why the last entry: a consistency proof relates two roots and leaves the claimed new size
/// nearly free (several sizes share one path). Too high a size would lock the log out for ever,
/// since sizes only grow. A log entry starts with its own index as u64 big-endian, so the entry
/// that the tree really ends with says how large the tree is. `commit` checks that the bytes it is
/// shown are the tree's rightmost leaf and reads the size from them.
///
/// Storage layout, part of the interface, since `eth_getProof` addresses it:
///   slot 0: size, uint64 in the low 8 bytes, all other bytes zero
///   slot 1: root, bytes32
///
/// @dev Warning: the contract does not see the log's Ed25519 signature (the EVM has no Ed25519).
/// That (size, root) is what the log signed is for the reader to check, with the signed note.
/// @dev Warning: a log operator who writes a false index into the log's last entry can anchor a
/// false size. Every verifier checks an entry's index against its proof, so that log convicts
/// itself; the contract does not judge the older entries.
/// @dev Warning: calldata grows with the last entry (at most 65,535 bytes, some 2.6 million gas).
interface ICheckpointAnchor {
    /// @notice (size, root) is now the anchored checkpoint; before it stood `previousSize`.
    event Committed(uint64 indexed size, bytes32 root, uint64 previousSize);

    /// @notice Another account may commit from now on.
    event CommitterSet(address indexed committer);

    /// @notice Only `committer` may commit.
    error NotCommitter(address caller);
    /// @notice An address that must be somebody is zero.
    error ZeroAddress();
    /// @notice The log is anchored at `anchored` entries already; `proposed` is smaller.
    error Rollback(uint64 anchored, uint64 proposed);
    /// @notice Same size, other root: two histories of one log.
    error Fork(uint64 size, bytes32 anchoredRoot, bytes32 proposedRoot);
    /// @notice The proof does not lead from the anchored (size, root) to the proposed one.
    error NotAnExtension(uint64 anchored, uint64 proposed);
    /// @notice The entry shown is not the rightmost leaf under the proposed root.
    error NotTheLastEntry(uint64 proposed);
    /// @notice The last entry carries `index`; a tree of the proposed size ends with size - 1.
    error WrongSize(uint64 proposed, uint64 index);

    /// @notice SHA-256 of the log's origin line: which log this contract anchors.
    function originHash() external view returns (bytes32);

    /// @notice Entries in the anchored tree; 0 before the first commit. Slot 0.
    function size() external view returns (uint64);

    /// @notice RFC 9162 root of the anchored tree; 0 before the first commit. Slot 1.
    function root() external view returns (bytes32);

    /// @notice Who may commit.
    function committer() external view returns (address);

    /// @notice Anchor a larger tree. The anchored pair again is no error and changes nothing, so
    /// that a committer may repeat a call whose answer it lost.
    /// @param newSize entries in the new tree, at least 1
    /// @param newRoot its RFC 9162 root
    /// @param consistency RFC 9162 section 2.1.4.1 proof from the anchored size to `newSize`;
    /// empty for the first commit
    /// @param lastEntry the log entry at index newSize - 1, whole
    /// @param inclusion RFC 9162 section 2.1.3.1 proof of that entry in the new tree
    /// @return advanced false when (newSize, newRoot) was anchored already
    function commit(
        uint64 newSize,
        bytes32 newRoot,
        bytes32[] calldata consistency,
        bytes calldata lastEntry,
        bytes32[] calldata inclusion
    ) external returns (bool advanced);

    /// @notice Owner only: name the account that commits (a lost or a stolen key).
    /// @dev Warning: a committer can extend the log, and nothing can undo what it anchored.
    function setCommitter(address newCommitter) external;
}
