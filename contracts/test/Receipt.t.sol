// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {Rfc9162} from "../src/Rfc9162.sol";
import {ReferenceTree} from "./ReferenceTree.sol";
import {Test} from "./Vm.sol";

/// @dev What a receipt promises (docs/FORMATS.md, "Receipt"), as a contract takes it.
struct Promise {
    string log;
    uint64 firstIndex;
    bytes32[] leaves;
    uint64 recordedAt;
    uint64 includedBy;
}

/// @dev What a contract needs to judge a receipt: who signed it, and whether an anchored root
/// contradicts it. Not deployed; a contract that slashes for it can start from here.
library ReceiptJudge {
    bytes32 internal constant TYPE = keccak256(
        "Receipt(string log,uint64 firstIndex,uint64 count,bytes32 leavesHash,uint64 recordedAt,uint64 includedBy)"
    );
    bytes32 internal constant DOMAIN = keccak256(
        "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
    );

    function digest(Promise memory p, uint256 chainId, address anchor)
        internal
        pure
        returns (bytes32)
    {
        bytes32 separator = keccak256(
            abi.encode(DOMAIN, keccak256("Tributary"), keccak256("1"), chainId, anchor)
        );
        bytes32 leavesHash = keccak256(abi.encodePacked(p.leaves));
        bytes32 hash = keccak256(
            abi.encode(
                TYPE,
                keccak256(bytes(p.log)),
                p.firstIndex,
                uint64(p.leaves.length),
                leavesHash,
                p.recordedAt,
                p.includedBy
            )
        );
        return keccak256(abi.encodePacked(hex"1901", separator, hash));
    }

    /// @dev Another leaf than promised stands at `index` of the tree (size, root).
    function contradicted(
        Promise memory p,
        uint64 index,
        bytes32 leaf,
        bytes32[] memory proof,
        uint64 size,
        bytes32 root
    ) internal pure returns (bool) {
        require(p.firstIndex <= index && index - p.firstIndex < p.leaves.length, "not promised");
        require(included(index, size, leaf, proof, root), "not in the tree");
        return leaf != p.leaves[index - p.firstIndex];
    }

    /// @dev RFC 9162 section 2.1.3.2.
    function included(
        uint64 index,
        uint64 size,
        bytes32 leaf,
        bytes32[] memory proof,
        bytes32 root
    ) internal pure returns (bool) {
        if (index >= size) return false;
        (uint64 fn, uint64 sn, bytes32 node) = (index, size - 1, leaf);
        for (uint256 i = 0; i < proof.length; ++i) {
            if (sn == 0) return false;
            if (fn & 1 == 1 || fn == sn) {
                node = Rfc9162.nodeHash(proof[i], node);
                while (fn & 1 == 0 && fn != 0) (fn, sn) = (fn >> 1, sn >> 1);
            } else {
                node = Rfc9162.nodeHash(node, proof[i]);
            }
            (fn, sn) = (fn >> 1, sn >> 1);
        }
        return sn == 0 && node == root;
    }
}

contract ReceiptTest is Test {
    // The same values stand in tests/unit/test_chain_receipts.py, which signs them in Python.
    string private constant LOG = "ledger.example/main";
    uint64 private constant FIRST_INDEX = 1_234;
    uint64 private constant RECORDED_AT = 1_700_000_000_000_000;
    uint64 private constant INCLUDED_BY = 1_700_000_060_000_000;
    uint256 private constant CHAIN_ID = 31_337;
    address private constant ANCHOR = address(0xA1A1a1a1A1A1A1A1A1a1a1a1a1a1A1A1a1A1a1a1);
    address private constant SIGNER = address(0x17c5185167401eD00cF5F5b2fc97D9BBfDb7D025);
    bytes32 private constant DIGEST =
        0xd6ea225239138391ca780cc2bede37b4802dab9675640465dc0d715ffba744f1;
    bytes private constant SIGNATURE =
        hex"93dd6ad4146b37e44b6ff7aacbbac970461c0f4a8ab7a8a7389ae2d79cc2066b1be11ea19a57ad1cafd9f9683e44efeb1e6bf83e584a9fd5598a48c16f34bcb41c";

    function _promise(bytes32[] memory leaves, uint64 first) private pure returns (Promise memory) {
        return Promise(LOG, first, leaves, RECORDED_AT, INCLUDED_BY);
    }

    function _three() private pure returns (Promise memory) {
        bytes32[] memory leaves = new bytes32[](3);
        for (uint256 i = 0; i < 3; ++i) leaves[i] = bytes32((i + 1) * (type(uint256).max / 15));
        return _promise(leaves, FIRST_INDEX);
    }

    function test_recovers_who_signed_in_python() public pure {
        bytes32 digest = ReceiptJudge.digest(_three(), CHAIN_ID, ANCHOR);
        same(digest, DIGEST, "digest");
        same(uint160(ECDSA.recover(digest, SIGNATURE)), uint160(SIGNER), "signer");
    }

    function test_another_promise_has_another_signer() public view {
        Promise memory p = _three();
        p.leaves[1] = ~p.leaves[1];
        bytes32 digest = ReceiptJudge.digest(p, CHAIN_ID, ANCHOR);
        (address found,,) = ECDSA.tryRecover(digest, SIGNATURE);
        require(found != SIGNER, "a changed leaf must change the signer");
        digest = ReceiptJudge.digest(_three(), CHAIN_ID, address(this));
        (found,,) = ECDSA.tryRecover(digest, SIGNATURE);
        require(found != SIGNER, "another anchor must change the signer");
    }

    function test_a_root_contradicts_a_promise_exactly_where_the_leaf_differs() public {
        ReferenceTree tree = new ReferenceTree(0, 0);
        for (uint64 size = 1; size <= 9; ++size) {
            bytes32 root = tree.root(size);
            for (uint64 index = 0; index < size; ++index) {
                bytes32 leaf = sha256(abi.encodePacked(uint8(0), tree.entry(index)));
                bytes32[] memory proof = tree.inclusion(index, size);
                bytes32[] memory leaves = new bytes32[](1);
                leaves[0] = leaf;
                Promise memory kept = _promise(leaves, index);
                require(
                    !ReceiptJudge.contradicted(kept, index, leaf, proof, size, root), "was kept"
                );
                bytes32[] memory other = new bytes32[](1);
                other[0] = ~leaf;
                Promise memory broken = _promise(other, index);
                require(
                    ReceiptJudge.contradicted(broken, index, leaf, proof, size, root), "was broken"
                );
                require(
                    !ReceiptJudge.included(index, size, ~leaf, proof, root), "not in the tree"
                );
            }
        }
    }
}
