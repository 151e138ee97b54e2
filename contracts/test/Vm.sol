// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

/// @dev The cheatcodes these tests use; forge-std is not on npm and is not needed for this.
interface Vm {
    function prank(address sender) external;
    function startPrank(address sender) external;
    function stopPrank() external;
    function warp(uint256 timestamp) external;
    function deal(address account, uint256 balance) external;
    function addr(uint256 privateKey) external pure returns (address);
    function sign(uint256 privateKey, bytes32 digest)
        external
        pure
        returns (uint8 v, bytes32 r, bytes32 s);
    function load(address target, bytes32 slot) external view returns (bytes32);
    function assume(bool condition) external pure;
    function expectRevert() external;
    function expectRevert(bytes calldata revertData) external;
    function expectEmit(bool topic1, bool topic2, bool topic3, bool data) external;
    function snapshotGasLastCall(string calldata group, string calldata name)
        external
        returns (uint256);
}

/// @dev Assertions that say what they compared.
abstract contract Test {
    Vm internal constant vm = Vm(address(uint160(uint256(keccak256("hevm cheat code")))));

    error Differ(string what, uint256 left, uint256 right);

    function same(uint256 left, uint256 right, string memory what) internal pure {
        if (left != right) revert Differ(what, left, right);
    }

    function same(bytes32 left, bytes32 right, string memory what) internal pure {
        if (left != right) revert Differ(what, uint256(left), uint256(right));
    }

    function bound(uint256 value, uint256 low, uint256 high) internal pure returns (uint256) {
        return low + value % (high - low + 1);
    }
}
