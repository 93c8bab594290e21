//! What pintle keeps on disk: the journal, and the credential pair that everybody else reads.

pub mod durable;
pub mod journal;
pub mod pair;
pub mod shared;
mod stamp;

pub use journal::{Journal, JournalError};
pub use pair::{FoundPair, PairDirectory};
pub use stamp::FileStamp;
