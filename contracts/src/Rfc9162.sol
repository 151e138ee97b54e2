// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

/// @title The two RFC 9162 proofs that an anchor needs, over SHA-256
/// @notice Leaf SHA-256(0x00 || entry), node SHA-256(0x01 || left || right): RFC 9162 section
/// 2.1.1. Pure; it returns false for a bad proof and never reverts on one.
/// @dev Backed by test/Rfc9162.t.sol: every pair of sizes up to 64, every proof hash corrupted.
library Rfc9162 {
    /// @notice No proof between sizes of 64 bits is longer: one hash per level, and the seed.
    uint256 internal constant MAX_PROOF = 65;

    function leafHash(bytes calldata entry) internal pure returns (bytes32) {
        return sha256(abi.encodePacked(bytes1(0x00), entry));
    }

    function nodeHash(bytes32 left, bytes32 right) internal pure returns (bytes32) {
        return sha256(abi.encodePacked(bytes1(0x01), left, right));
    }

    /// @notice RFC 9162 section 2.1.4.2: is the tree (size1, root1) a prefix of (size2, root2)?
    /// @dev Needs 0 < size1 < size2. Warning: the answer concerns the roots. A wrong size with the
    /// same shape along the proof's path gives the same answer, so a caller binds size2 otherwise.
    function consistent(
        uint64 size1,
        uint64 size2,
        bytes32 root1,
        bytes32 root2,
        bytes32[] calldata proof
    ) internal pure returns (bool) {
        if (size1 == 0 || size1 >= size2 || proof.length > MAX_PROOF) return false;
        // Step 2: where size1 is a power of two, root1 itself is the first hash of the path.
        uint256 k = 0;
        bytes32 seed = root1;
        if (size1 & (size1 - 1) != 0) {
            if (proof.length == 0) return false;
            seed = proof[k++];
        }
        // Steps 3 and 4.
        uint64 fn = size1 - 1;
        uint64 sn = size2 - 1;
        while (fn & 1 == 1) {
            fn >>= 1;
            sn >>= 1;
        }
        // Steps 5 and 6.
        bytes32 fr = seed;
        bytes32 sr = seed;
        for (; k < proof.length; ++k) {
            if (sn == 0) return false;
            bytes32 c = proof[k];
            if (fn & 1 == 1 || fn == sn) {
                fr = nodeHash(c, fr);
                sr = nodeHash(c, sr);
                while (fn & 1 == 0 && fn != 0) {
                    fn >>= 1;
                    sn >>= 1;
                }
            } else {
                sr = nodeHash(sr, c);
            }
            fn >>= 1;
            sn >>= 1;
        }
        // Step 7.
        return fr == root1 && sr == root2 && sn == 0;
    }

    /// @notice RFC 9162 section 2.1.3.2 for the last leaf: is `leaf` at index size - 1 of `root`?
    /// @dev With leaf index == size - 1 the RFC's fn and sn stay equal, so every sibling stands on
    /// the left and there is one for each bit set in size - 1. A leaf under siblings that are all
    /// on the left is the rightmost leaf of the tree, whatever size is claimed for it.
    function isLastLeaf(bytes32 leaf, uint64 size, bytes32 root, bytes32[] calldata proof)
        internal
        pure
        returns (bool)
    {
        if (size == 0) return false;
        uint256 siblings = 0;
        for (uint64 rest = size - 1; rest != 0; rest &= rest - 1) {
            ++siblings;
        }
        if (proof.length != siblings) return false;
        bytes32 hash = leaf;
        for (uint256 k = 0; k < siblings; ++k) {
            hash = nodeHash(proof[k], hash);
        }
        return hash == root;
    }
}
