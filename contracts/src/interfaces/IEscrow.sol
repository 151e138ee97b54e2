// SPDX-License-Identifier: Apache-2.0
pragma solidity >=0.8.24;

/// @title Escrow: what consumers prepaid, until a period's fees move to the distributor
/// @notice A deposit credits an account of the ledger, named by its 32-byte Ed25519 key; the
/// ledger books it when it reads `Deposited`. At the close of a period the owner releases what
/// was spent to the one distributor this contract knows.
/// @dev Warning: the contract does not know what an account has spent. Until vouchers exist the
/// owner decides how much is released, and a deposit cannot be taken back here. What bounds the
/// owner: money leaves to the distributor only, never more than was deposited, once per period.
interface IEscrow {
    /// @notice `amount` arrived for `account`. `depositId` counts from 0 without gaps.
    event Deposited(
        bytes32 indexed account, address indexed from, uint256 amount, uint256 depositId
    );
    /// @notice `amount` went to the distributor for `period`.
    event Released(uint64 indexed period, uint256 amount);

    /// @notice An amount, a period, an account or an address that must not be zero is.
    error Zero();
    /// @notice `period` was released before.
    error AlreadyReleased(uint64 period);
    /// @notice Only `available` is left of the deposits.
    error Insufficient(uint256 available, uint256 wanted);

    /// @notice Deposits so far: the id that the next one gets.
    function deposits() external view returns (uint256);

    /// @notice Deposited and not yet released, in base units.
    function available() external view returns (uint256);

    /// @notice What was released for a period, in base units; 0 if nothing yet.
    function released(uint64 period) external view returns (uint256);

    /// @notice Pull `amount` of the token from the caller, who approved it, for `account`.
    /// @dev Warning: credits what arrives, which is less than `amount` for a token that takes a
    /// fee. A plain token transfer to this contract credits nobody and cannot be released.
    /// @return depositId names the deposit, with this contract's address, for ever
    function deposit(bytes32 account, uint256 amount) external returns (uint256 depositId);

    /// @notice Owner only, once per period (1, 2, ...): send `amount` to the distributor.
    function release(uint64 period, uint256 amount) external;
}
