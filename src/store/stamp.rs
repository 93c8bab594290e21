//! Which file stands somewhere, and in which state.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::world::Files;
use crate::world::files::Metadata;

/// What a file is at one moment: whoever writes it, replaces it or touches it changes that. Its size is left out, which
/// would say something of a secret in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStamp {
    device: u64,
    inode: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileStamp {
    /// Of the file at this path, or the one that a link there leads to; `None` if there is none that can be seen.
    pub fn of(files: &dyn Files, path: &Path) -> Option<Self> {
        files.metadata(path).ok().as_ref().map(Self::from)
    }

    /// When it was put where it is, or changed, in seconds and nanoseconds since the epoch: a file that is moved keeps the
    /// time of its content, and not this one (`st_ctim`, stat(3type)).
    pub fn changed(&self) -> (i64, i64) {
        self.changed
    }
}

impl From<&Metadata> for FileStamp {
    fn from(found: &Metadata) -> Self {
        Self { device: found.device, inode: found.inode, modified: found.modified, changed: found.changed }
    }
}
