// SPDX-License-Identifier: Apache-2.0 OR MIT

// The addresses of PCI devices, as a firmware gives them.

#include "guest.h"

// Address of the configuration space in memory, of which each bus has 1 MiB.
#define CONFIG 0xb0000000ul

// Addresses for BARs: below 4 GiB, and from 64 GiB on, where start.S maps 8 GiB. Processors with 37
// bits of address have both.
static uint64_t next_low = 0xc0000000;
static uint64_t next_high = 64ul << 30;
static uint8_t next_bus = 1;

static uint64_t aligned(uint64_t value, uint64_t size)
{
    return (value + size - 1) & -size;
}

static void place_bars(uint64_t config, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        uint64_t bar = config + 0x10 + 4 * i;
        uint32_t kind = load32(bar);
        store32(bar, 0xffffffff);
        uint64_t mask = load32(bar);
        if (mask == 0)
            continue;
        if (kind & 1) {
            // No port is given away.
            store32(bar, 0);
        } else if ((kind & 6) == 4) {
            store32(bar + 4, 0xffffffff);
            mask |= (uint64_t)load32(bar + 4) << 32;
            uint64_t size = -(mask & ~0xful);
            // Behind a bridge, only a prefetchable BAR may lie above 4 GiB.
            uint64_t *next = kind & 8 ? &next_high : &next_low;
            *next = aligned(*next, size);
            store32(bar, *next);
            store32(bar + 4, *next >> 32);
            *next += size;
            i++;
        } else {
            uint64_t size = (uint32_t)-(mask & ~0xful);
            next_low = aligned(next_low, size);
            store32(bar, next_low);
            next_low += size;
        }
    }
}

static void scan(uint8_t bus);

static void place_bridge(uint64_t config, uint8_t bus)
{
    uint8_t behind = next_bus++;
    store8(config + 0x18, bus);
    store8(config + 0x19, behind);
    store8(config + 0x1a, 0xff);
    place_bars(config, 2);
    next_low = aligned(next_low, 1 << 20);
    next_high = aligned(next_high, 1 << 20);
    uint64_t low = next_low, high = next_high;
    scan(behind);
    // Even an empty bridge gets windows, for a device that is plugged in later.
    next_low = aligned(next_low + 1, 1 << 20);
    next_high = aligned(next_high + 1, 16 << 20);
    store8(config + 0x1a, next_bus - 1);
    store16(config + 0x20, low >> 16);
    store16(config + 0x22, (next_low - 1) >> 16);
    store16(config + 0x24, high >> 16);
    store16(config + 0x26, (next_high - 1) >> 16);
    store32(config + 0x28, high >> 32);
    store32(config + 0x2c, (next_high - 1) >> 32);
    // Memory accesses, and bus mastering.
    store16(config + 4, 6);
}

static void scan(uint8_t bus)
{
    for (uint32_t place = 0; place < 256; place++) {
        uint64_t config = CONFIG + ((uint64_t)bus << 20) + (place << 12);
        uint8_t kind = load8(config + 0xe);
        int is_there = load32(config) != 0xffffffff;
        if (is_there && (kind & 0x7f) == 1) {
            place_bridge(config, bus);
        } else if (is_there) {
            place_bars(config, 6);
            store16(config + 4, load16(config + 4) | 2);
        }
        // Only some devices have further functions.
        if (!(place & 7) && !(is_there && kind & 0x80))
            place += 7;
    }
}

void start_pci(void)
{
    // Maps q35's configuration space.
    out32(0xcf8, 0x80000064);
    out32(0xcfc, CONFIG >> 32);
    out32(0xcf8, 0x80000060);
    out32(0xcfc, (uint32_t)CONFIG | 1);
    // Shows memory below 1 MiB where the ROM was (PAM registers), as any firmware does. QEMU then
    // reports these parts of the memory to devices over vfio-user and vhost-user. It hides them
    // before, because a reset leaves them open, and each boot should have the same effect.
    for (uint64_t i = 0x90; i <= 0x96; i++)
        store8(CONFIG + i, 0);
    store8(CONFIG + 0x90, 0x30);
    for (uint64_t i = 0x91; i <= 0x96; i++)
        store8(CONFIG + i, 0x33);
    // After a reset the processor begins in this memory, so the image must be there.
    for (uint64_t i = 0; i < 0x10000; i += 8)
        store64(0xf0000 + i, load64(0xffff0000 + i));
    scan(0);
}
