// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

import {Ownable, Ownable2Step} from "@openzeppelin/contracts/access/Ownable2Step.sol";

import {Rfc9162} from "./Rfc9162.sol";
import {ICheckpointAnchor} from "./interfaces/ICheckpointAnchor.sol";

/// @dev First in the order of inheritance, so that size is slot 0 and root slot 1.
abstract contract AnchorSlots {
    uint64 internal _size;
    bytes32 internal _root;
}

/// @title See ICheckpointAnchor, which documents it
contract CheckpointAnchor is AnchorSlots, Ownable2Step, ICheckpointAnchor {
    uint256 private constant INDEX_BYTES = 8;

    bytes32 public immutable originHash;
    address public committer;

    constructor(bytes32 originHash_, address committer_, address owner_) Ownable(owner_) {
        originHash = originHash_;
        _setCommitter(committer_);
    }

    function commit(
        uint64 newSize,
        bytes32 newRoot,
        bytes32[] calldata consistency,
        bytes calldata lastEntry,
        bytes32[] calldata inclusion
    ) external returns (bool advanced) {
        if (msg.sender != committer) revert NotCommitter(msg.sender);
        uint64 oldSize = _size;
        bytes32 oldRoot = _root;
        if (newSize < oldSize || newSize == 0) revert Rollback(oldSize, newSize);
        if (newSize == oldSize) {
            if (newRoot != oldRoot) revert Fork(newSize, oldRoot, newRoot);
            return false;
        }
        _requireExtension(oldSize, newSize, oldRoot, newRoot, consistency);
        _requireSize(newSize, newRoot, lastEntry, inclusion);

        _size = newSize;
        _root = newRoot;
        emit Committed(newSize, newRoot, oldSize);
        return true;
    }

    function setCommitter(address newCommitter) external onlyOwner {
        _setCommitter(newCommitter);
    }

    function size() external view returns (uint64) {
        return _size;
    }

    function root() external view returns (bytes32) {
        return _root;
    }

    function _requireExtension(
        uint64 oldSize,
        uint64 newSize,
        bytes32 oldRoot,
        bytes32 newRoot,
        bytes32[] calldata consistency
    ) private pure {
        // The empty tree is a prefix of every tree, and its proof is empty.
        bool extends_ = oldSize == 0
            ? consistency.length == 0
            : Rfc9162.consistent(oldSize, newSize, oldRoot, newRoot, consistency);
        if (!extends_) revert NotAnExtension(oldSize, newSize);
    }

    function _requireSize(
        uint64 newSize,
        bytes32 newRoot,
        bytes calldata lastEntry,
        bytes32[] calldata inclusion
    ) private pure {
        if (lastEntry.length < INDEX_BYTES) revert NotTheLastEntry(newSize);
        uint64 index = uint64(bytes8(lastEntry));
        if (index != newSize - 1) revert WrongSize(newSize, index);
        bytes32 leaf = Rfc9162.leafHash(lastEntry);
        if (!Rfc9162.isLastLeaf(leaf, newSize, newRoot, inclusion)) {
            revert NotTheLastEntry(newSize);
        }
    }

    function _setCommitter(address newCommitter) private {
        if (newCommitter == address(0)) revert ZeroAddress();
        committer = newCommitter;
        emit CommitterSet(newCommitter);
    }
}
