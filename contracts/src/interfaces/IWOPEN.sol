// SPDX-License-Identifier: Apache-2.0
pragma solidity >=0.8.24;

/// @title WOPEN: the chain's native OPEN as an ERC-20, one for one
/// @notice ERC-20 with ERC-2612 permit. Supply equals the native coin this contract was sent
/// through `deposit` or a plain transfer, less what was withdrawn.
/// @dev Warning: coin forced in (a block reward, selfdestruct) mints nothing and stays for ever,
/// so the balance may exceed the supply and never falls below it.
interface IWOPEN {
    event Deposit(address indexed to, uint256 amount);
    event Withdrawal(address indexed from, uint256 amount);

    /// @notice The receiver refused the native coin.
    error TransferFailed(address to, uint256 amount);

    /// @notice Wrap the coin that comes with the call. A plain transfer does the same.
    function deposit() external payable;

    /// @notice Unwrap `amount` of the caller's tokens and send the coin to the caller.
    function withdraw(uint256 amount) external;
}
