// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

import {Rfc9162} from "../src/Rfc9162.sol";
import {ReferenceTree} from "./ReferenceTree.sol";
import {Test} from "./Vm.sol";

contract Rfc9162Test is Test {
    uint64 private constant MAX = 64;

    ReferenceTree private tree = new ReferenceTree(0, 0);

    function consistent(uint64 m, uint64 n, bytes32 r1, bytes32 r2, bytes32[] calldata proof)
        external
        pure
        returns (bool)
    {
        return Rfc9162.consistent(m, n, r1, r2, proof);
    }

    function isLastLeaf(bytes32 leaf, uint64 size, bytes32 root, bytes32[] calldata proof)
        external
        pure
        returns (bool)
    {
        return Rfc9162.isLastLeaf(leaf, size, root, proof);
    }

    function leafHash(bytes calldata entry) external pure returns (bytes32) {
        return Rfc9162.leafHash(entry);
    }

    function test_every_pair_of_sizes_and_every_hash_corrupted() public {
        for (uint64 n = 2; n <= MAX; ++n) {
            bytes32 r2 = tree.root(n);
            for (uint64 m = 1; m < n; ++m) {
                bytes32 r1 = tree.root(m);
                bytes32[] memory proof = tree.consistency(m, n);
                require(this.consistent(m, n, r1, r2, proof), "a good proof fails");
                require(!this.consistent(m, n, ~r1, r2, proof), "wrong root1 passes");
                require(!this.consistent(m, n, r1, ~r2, proof), "wrong root2 passes");
                for (uint256 i = 0; i < proof.length; ++i) {
                    proof[i] ^= bytes32(uint256(1) << (n + m));
                    require(!this.consistent(m, n, r1, r2, proof), "a corrupted proof passes");
                    proof[i] ^= bytes32(uint256(1) << (n + m));
                }
                require(!this.consistent(m, n, r1, r2, _resized(proof, 1)), "a long proof passes");
                if (proof.length > 0) {
                    require(!this.consistent(m, n, r1, r2, _resized(proof, -1)), "short passes");
                }
            }
        }
    }

    function test_every_last_leaf() public {
        for (uint64 n = 1; n <= MAX; ++n) {
            bytes32 leaf = tree.hash(n - 1, n);
            bytes32 root = tree.root(n);
            bytes32[] memory proof = tree.inclusion(n - 1, n);
            require(this.isLastLeaf(leaf, n, root, proof), "the last leaf fails");
            require(!this.isLastLeaf(~leaf, n, root, proof), "another leaf passes");
            require(!this.isLastLeaf(leaf, n, ~root, proof), "another root passes");
            require(!this.isLastLeaf(leaf, n, root, _resized(proof, 1)), "a long proof passes");
            for (uint256 i = 0; i < proof.length; ++i) {
                proof[i] ^= bytes32(uint256(1) << n);
                require(!this.isLastLeaf(leaf, n, root, proof), "a corrupted proof passes");
                proof[i] ^= bytes32(uint256(1) << n);
            }
            for (uint64 other = 0; other + 1 < n; ++other) {
                bytes32[] memory path = tree.inclusion(other, n);
                bytes32 inner = tree.hash(other, other + 1);
                require(!this.isLastLeaf(inner, n, root, path), "a leaf inside passes as last");
            }
        }
    }

    function test_leaf_hash() public view {
        // RFC 9162 leaf of the empty entry, the well-known SHA-256(0x00).
        same(
            this.leafHash(""),
            0x6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d,
            "SHA-256(00)"
        );
    }

    function test_sizes_that_are_none() public view {
        bytes32[] memory none = new bytes32[](0);
        require(!this.consistent(0, 1, 0, 0, none), "size1 = 0");
        require(!this.consistent(2, 2, 0, 0, none), "equal sizes");
        require(!this.consistent(3, 2, 0, 0, none), "falling sizes");
        require(!this.consistent(1, 2, 0, 0, new bytes32[](66)), "a proof over MAX_PROOF");
        require(!this.isLastLeaf(0, 0, 0, none), "an empty tree has no last leaf");
    }

    function test_the_same_root_does_not_prove_a_larger_size() public {
        // An empty proof folds to root1 itself; only step 7's sn == 0 stops it as "root2".
        bytes32[] memory none = new bytes32[](0);
        for (uint64 m = 1; m <= MAX; m *= 2) {
            bytes32 root = tree.root(m);
            for (uint64 n = m + 1; n <= 2 * MAX; ++n) {
                require(!this.consistent(m, n, root, root, none), "one root, two sizes");
            }
        }
    }

    /// forge-config: default.fuzz.runs = 500
    function testFuzz_random_bytes_prove_nothing(
        uint64 m,
        uint64 n,
        bytes32 r1,
        bytes32 r2,
        bytes32[] calldata proof
    ) public view {
        vm.assume(r1 != r2 || proof.length != 0);
        require(!this.consistent(m, n, r1, r2, proof), "random bytes pass");
    }

    function _resized(bytes32[] memory proof, int256 by) private pure returns (bytes32[] memory to) {
        to = new bytes32[](uint256(int256(proof.length) + by));
        for (uint256 i = 0; i < to.length && i < proof.length; ++i) {
            to[i] = proof[i];
        }
    }
}
