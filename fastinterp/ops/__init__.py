"""The contract: operations that methods request, and the steps that carry them out, as plain values. No I/O."""
