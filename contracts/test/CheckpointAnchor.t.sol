// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

import {CheckpointAnchor} from "../src/CheckpointAnchor.sol";
import {ICheckpointAnchor} from "../src/interfaces/ICheckpointAnchor.sol";
import {ReferenceTree} from "./ReferenceTree.sol";
import {Test} from "./Vm.sol";

contract CheckpointAnchorTest is Test {
    bytes32 private constant ORIGIN = sha256("log.example/one");

    ReferenceTree private tree = new ReferenceTree(0, 0);
    CheckpointAnchor private anchor = new CheckpointAnchor(ORIGIN, address(this), address(this));

    function _commit(ReferenceTree t, uint64 size) private returns (bool) {
        uint64 from = anchor.size();
        bytes32[] memory proof =
            from == 0 || from >= size ? new bytes32[](0) : t.consistency(from, size);
        bytes32[] memory path = t.inclusion(size - 1, size);
        bytes32 root = t.root(size);
        bytes memory entry = t.entry(size - 1);
        return anchor.commit(size, root, proof, entry, path);
    }

    function test_grows_and_tells() public {
        uint64[6] memory sizes = [uint64(1), 2, 5, 13, 64, 65];
        uint64 before = 0;
        for (uint256 i = 0; i < sizes.length; ++i) {
            bytes32 root = tree.root(sizes[i]);
            bytes32[] memory proof =
                before == 0 ? new bytes32[](0) : tree.consistency(before, sizes[i]);
            bytes32[] memory path = tree.inclusion(sizes[i] - 1, sizes[i]);
            vm.expectEmit(true, true, true, true);
            emit ICheckpointAnchor.Committed(sizes[i], root, before);
            require(
                anchor.commit(sizes[i], root, proof, _entry(sizes[i] - 1), path), "not advanced"
            );
            same(anchor.size(), sizes[i], "size");
            same(anchor.root(), root, "root");
            before = sizes[i];
        }
        same(anchor.originHash(), ORIGIN, "origin");
    }

    function test_storage_slots() public {
        _commit(tree, 7);
        same(vm.load(address(anchor), 0), bytes32(uint256(7)), "slot 0");
        same(vm.load(address(anchor), bytes32(uint256(1))), tree.root(7), "slot 1");
    }

    function test_the_same_pair_again_changes_nothing() public {
        require(_commit(tree, 9), "first");
        require(!_commit(tree, 9), "second must report no advance");
        same(anchor.size(), 9, "size");
    }

    function test_refuses_a_fork_of_equal_size() public {
        _commit(tree, 9);
        bytes32 other = ~tree.root(9);
        bytes32[] memory none = new bytes32[](0);
        vm.expectRevert(
            abi.encodeWithSelector(ICheckpointAnchor.Fork.selector, 9, tree.root(9), other)
        );
        anchor.commit(9, other, none, "", none);
    }

    function test_refuses_a_fork_of_larger_size() public {
        _commit(tree, 9);
        ReferenceTree forked = new ReferenceTree(4, 64);
        bytes32[] memory proof = forked.consistency(9, 20);
        bytes32[] memory path = forked.inclusion(19, 20);
        bytes32 root = forked.root(20);
        vm.expectRevert(abi.encodeWithSelector(ICheckpointAnchor.NotAnExtension.selector, 9, 20));
        anchor.commit(20, root, proof, _entry(19), path);
    }

    function test_refuses_a_rollback() public {
        _commit(tree, 9);
        bytes32[] memory none = new bytes32[](0);
        bytes32 root = tree.root(8);
        vm.expectRevert(abi.encodeWithSelector(ICheckpointAnchor.Rollback.selector, 9, 8));
        anchor.commit(8, root, none, "", none);
    }

    function test_refuses_the_empty_tree() public {
        bytes32[] memory none = new bytes32[](0);
        bytes32 root = sha256("");
        vm.expectRevert(abi.encodeWithSelector(ICheckpointAnchor.Rollback.selector, 0, 0));
        anchor.commit(0, root, none, "", none);
    }

    function test_refuses_another_sender() public {
        bytes32[] memory none = new bytes32[](0);
        bytes32 root = tree.root(1);
        vm.expectRevert(
            abi.encodeWithSelector(ICheckpointAnchor.NotCommitter.selector, address(0xbad))
        );
        vm.prank(address(0xbad));
        anchor.commit(1, root, none, _entry(0), none);
    }

    function test_refuses_any_wrong_size_for_a_right_root() public {
        _commit(tree, 5);
        for (uint64 n = 6; n <= 24; ++n) {
            bytes32[] memory proof = tree.consistency(5, n);
            bytes32[] memory path = tree.inclusion(n - 1, n);
            bytes32 root = tree.root(n);
            for (uint64 claimed = 6; claimed <= 40; ++claimed) {
                if (claimed == n) continue;
                // The true last entry carries n - 1; an entry that carries the claim is not last.
                vm.expectRevert();
                anchor.commit(claimed, root, proof, _entry(n - 1), path);
                vm.expectRevert();
                anchor.commit(claimed, root, proof, _entry(claimed - 1), path);
            }
        }
    }

    function test_consistency_alone_would_take_a_wrong_size() public {
        // Why the last entry is there: sizes 6 and 7 share the path from 4, so this proof of
        // (6, root6) also "proves" (7, root6). What refuses it is the index in the last entry.
        _commit(tree, 4);
        bytes32[] memory proof = tree.consistency(4, 6);
        bytes32[] memory path = tree.inclusion(5, 6);
        bytes32 root = tree.root(6);
        vm.expectRevert(abi.encodeWithSelector(ICheckpointAnchor.WrongSize.selector, 7, 5));
        anchor.commit(7, root, proof, _entry(5), path);
        vm.expectRevert(abi.encodeWithSelector(ICheckpointAnchor.NotTheLastEntry.selector, 7));
        anchor.commit(7, root, proof, _entry(6), path);
        vm.expectRevert(abi.encodeWithSelector(ICheckpointAnchor.NotTheLastEntry.selector, 7));
        anchor.commit(7, root, proof, hex"00000000000006", path);
    }

    function test_committer_changes_by_owner_only() public {
        anchor.setCommitter(address(0xc0ffee));
        same(uint160(anchor.committer()), 0xc0ffee, "committer");
        vm.prank(address(0xbad));
        vm.expectRevert();
        anchor.setCommitter(address(0xbad));
        vm.expectRevert(abi.encodeWithSelector(ICheckpointAnchor.ZeroAddress.selector));
        anchor.setCommitter(address(0));
    }

    /// forge-config: default.fuzz.runs = 64
    function testFuzz_any_growth_is_accepted(uint16[8] calldata steps) public {
        uint64 size = 0;
        for (uint256 i = 0; i < steps.length; ++i) {
            size += uint64(1 + steps[i] % 97);
            require(_commit(tree, size), "growth refused");
        }
    }

    function test_gas_of_large_trees() public {
        _gas(10, "commit, 2^10 entries");
        _gas(20, "commit, 2^20 entries");
        _gas(30, "commit, 2^30 entries");
    }

    /// @dev From an odd size below 2^h to one above: about the longest proof of that height.
    function _gas(uint256 height, string memory name) private {
        uint64 half = uint64(1) << uint64(height - 1);
        uint64 from = half + half / 3;
        uint64 to = from + half / 2;
        ReferenceTree large = new ReferenceTree(to - 1, from - 1);
        anchor = new CheckpointAnchor(ORIGIN, address(this), address(this));
        _commit(large, from);
        _commit(large, to);
        vm.snapshotGasLastCall("CheckpointAnchor", name);
    }

    function _entry(uint64 index) private pure returns (bytes memory) {
        return abi.encodePacked(index, index, "entry");
    }
}
