"""The contract: operations that methods ask for, and the steps that carry them out, as plain values. No I/O."""
