// SPDX-License-Identifier: Apache-2.0 OR MIT

// Interrupts by the local APIC, counted by vector.

#include "guest.h"

// Registers of the local APIC.
#define END_OF_INTERRUPT (APIC + 0xb0)
#define SPURIOUS (APIC + 0xf0)
#define TIMER (APIC + 0x320)
#define TIMER_COUNT (APIC + 0x380)
#define TIMER_DIVIDER (APIC + 0x3e0)

// Vectors of the timer, and of interrupts that turn out to be none.
#define TICK 0x20
#define NONE 0xff

extern uint8_t entries[];
volatile uint64_t taken[256];
static uint64_t idt[512] __attribute__((aligned(16)));
static volatile uint64_t echo_address;
static volatile uint32_t echo_value;
static volatile uint8_t echo_vector;

// Called by start.S.
void interrupted(uint64_t vector, uint64_t error, uint64_t address)
{
    if (vector < 32) {
        uint64_t accessed;
        asm volatile("mov %%cr2, %0" : "=r"(accessed));
        say("FAULT");
        say_number(vector);
        say_number(error);
        say_number(address);
        say_number(accessed);
        say("\n");
        for (;;)
            asm volatile("cli; hlt");
    }
    taken[vector]++;
    if (vector == echo_vector)
        store32(echo_address, echo_value);
    if (vector != NONE)
        store32(END_OF_INTERRUPT, 0);
}

void start_interrupts(void)
{
    for (uint64_t vector = 0; vector < 256; vector++) {
        uint64_t entry = (uint64_t)entries + 16 * vector;
        // An interrupt gate to 64-bit code.
        idt[2 * vector] = (entry & 0xffff) | 0x8e0000180000ul | (entry >> 16 & 0xffff) << 48;
        idt[2 * vector + 1] = entry >> 32;
    }
    struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) idtr = { sizeof idt - 1, (uint64_t)idt };
    asm volatile("lidt %0" : : "m"(idtr));
    // Masks the two old interrupt controllers.
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
    store32(SPURIOUS, 0x100 | NONE);
    asm volatile("sti");
}

void sleep_until(uint8_t vector, uint64_t times, uint64_t ticks)
{
    // QEMU's and KVM's timer counts nanoseconds. Divides by 1, and repeats every 10 ms.
    store32(TIMER_DIVIDER, 0xb);
    store32(TIMER, 0x20000 | TICK);
    uint64_t end = taken[TICK] + ticks;
    store32(TIMER_COUNT, 10000000);
    for (;;) {
        asm volatile("cli");
        if (taken[vector] >= times || taken[TICK] >= end)
            break;
        // An interrupt that comes after the check ends `hlt`, because `sti` takes effect after it.
        asm volatile("sti; hlt");
    }
    asm volatile("sti");
    store32(TIMER, 0x10000);
}

void set_echo(uint8_t vector, uint64_t address, uint32_t value)
{
    echo_vector = 0;
    echo_address = address;
    echo_value = value;
    echo_vector = vector;
}
