// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of barlink's packages on an ordinary Debian, by the commands of `docs/install.md`.

mod built_driver;
mod packages;
mod support;
mod without_driver;
