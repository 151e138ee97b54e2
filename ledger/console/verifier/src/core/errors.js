// What may go wrong, under the names of ledger/errors.py. A VerificationError is the only thing that
// `verifyBundle` throws about a file; `detail.field` and `detail.entry` say where.

export class VerificationError extends Error {
  /** @param {string} slug @param {string} message @param {{field?: string, entry?: number|string}} detail */
  constructor(slug, message, detail = {}) {
    super(message);
    this.name = "VerificationError";
    this.slug = slug;
    this.detail = detail;
  }

  /** The same error, with what it is about said first. */
  about(prefix, detail) {
    return new VerificationError(this.slug, `${prefix}: ${this.message}`, {
      ...this.detail,
      ...detail,
    });
  }
}

export const malformed = (message, detail) =>
  new VerificationError("malformed-proof", message, detail);
export const badSignature = (message, detail) =>
  new VerificationError("bad-signature", message, detail);
export const notIncluded = (message, detail) =>
  new VerificationError("not-included", message, detail);
export const inconsistent = (message, detail) =>
  new VerificationError("inconsistent", message, detail);
export const anchorMismatch = (message, detail) =>
  new VerificationError("anchor-mismatch", message, detail);

/** An event or a value is not what the format says. Whoever reads it decides which
 * VerificationError that is; never thrown out of this folder. */
export class InvalidEvent extends Error {
  constructor(message, field = null) {
    super(message);
    this.name = "InvalidEvent";
    this.field = field;
  }
}
