// The verifier without a page: what tests and other programs may import.

export { FIELDS, ONCE, REFERENCES } from "./events.js";
export { verifyByEquation, verifyEd25519 } from "./ed25519.js";
export { isPolicy, parsePolicy } from "./policy.js";
export { STEP_NAMES, verifyBundle } from "./verify.js";
