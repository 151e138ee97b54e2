// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

/// @dev RFC 9162 section 2.1 by its recursive definitions, not by the iterative algorithms that
/// src/Rfc9162.sol verifies with. Entry i is (i, i, "entry"); but leaves below `sparse` are all
/// one constant, leaf `except` aside, so that trees of 2^30 leaves have roots after a few hashes.
contract ReferenceTree {
    uint64 public immutable sparse;
    uint64 public immutable except;
    mapping(uint256 height => bytes32) private _constant;
    mapping(bytes32 range => bytes32) private _cache;

    constructor(uint64 sparse_, uint64 except_) {
        sparse = sparse_;
        except = except_;
        _constant[0] = sha256(abi.encodePacked(bytes1(0), "constant"));
        for (uint256 h = 1; h < 40; ++h) {
            _constant[h] = node(_constant[h - 1], _constant[h - 1]);
        }
    }

    function entry(uint64 index) public pure returns (bytes memory) {
        return abi.encodePacked(index, index, "entry");
    }

    function node(bytes32 left, bytes32 right) public pure returns (bytes32) {
        return sha256(abi.encodePacked(bytes1(0x01), left, right));
    }

    /// @dev MTH over the leaves [from, to).
    function hash(uint64 from, uint64 to) public returns (bytes32) {
        uint64 count = to - from;
        bool uniform = to <= sparse && (except < from || to <= except);
        if (uniform && count & (count - 1) == 0) return _constant[log2(count)];
        if (count == 1) return sha256(abi.encodePacked(bytes1(0), entry(from)));
        bytes32 key = bytes32(uint256(from) << 64 | to);
        if (_cache[key] != 0) return _cache[key];
        uint64 k = split(count);
        return _cache[key] = node(hash(from, from + k), hash(from + k, to));
    }

    function root(uint64 size) external returns (bytes32) {
        return hash(0, size);
    }

    /// @dev PATH(index, D[size]): section 2.1.3.1.
    function inclusion(uint64 index, uint64 size) external returns (bytes32[] memory) {
        return _path(index, 0, size);
    }

    /// @dev PROOF(size1, D[size2]): section 2.1.4.1.
    function consistency(uint64 size1, uint64 size2) external returns (bytes32[] memory) {
        return _subproof(size1, 0, size2, true);
    }

    function _path(uint64 index, uint64 from, uint64 to) private returns (bytes32[] memory) {
        uint64 count = to - from;
        if (count == 1) return new bytes32[](0);
        uint64 k = split(count);
        if (index < k) return _append(_path(index, from, from + k), hash(from + k, to));
        return _append(_path(index - k, from + k, to), hash(from, from + k));
    }

    function _subproof(uint64 m, uint64 from, uint64 to, bool complete)
        private
        returns (bytes32[] memory)
    {
        uint64 count = to - from;
        if (m == count) {
            return complete ? new bytes32[](0) : _append(new bytes32[](0), hash(from, to));
        }
        uint64 k = split(count);
        if (m <= k) return _append(_subproof(m, from, from + k, complete), hash(from + k, to));
        return _append(_subproof(m - k, from + k, to, false), hash(from, from + k));
    }

    function _append(bytes32[] memory list, bytes32 item) private pure returns (bytes32[] memory) {
        bytes32[] memory longer = new bytes32[](list.length + 1);
        for (uint256 i = 0; i < list.length; ++i) {
            longer[i] = list[i];
        }
        longer[list.length] = item;
        return longer;
    }

    /// @dev The largest power of two smaller than `count`.
    function split(uint64 count) private pure returns (uint64 k) {
        for (k = 1; k * 2 < count;) {
            k *= 2;
        }
    }

    function log2(uint64 count) private pure returns (uint256 h) {
        while (count > 1) {
            count >>= 1;
            ++h;
        }
    }
}
